//! Threads that carry out orders, one at a time, and report one fact for each.
//!
//! Everything that blocks runs on one: the VM's calls, the tracker's, the journal's. So a driver only
//! ever waits for facts. An order that panics fails like any other, and the migration with it: the
//! guest is kept.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::UnboundedSender;

use crate::core::message::{Failure, Input, Moment, Step};

/// As good as never: where a moment that no clock can hold is put.
const FAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Where facts go: to the driver's one waiting place.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    sender: UnboundedSender<(Moment, Input)>,
    clock: Clock,
}

/// The migration's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    began: Instant,
}

impl Clock {
    pub(crate) fn start() -> Self {
        Self {
            began: Instant::now(),
        }
    }

    pub(crate) fn now(self) -> Moment {
        self.moment(Instant::now())
    }

    pub(crate) fn moment(self, at: Instant) -> Moment {
        Moment(at.saturating_duration_since(self.began))
    }

    pub(crate) fn instant(self, moment: Moment) -> Instant {
        self.began
            .checked_add(moment.0)
            .unwrap_or_else(|| Instant::now() + FAR)
    }
}

impl Facts {
    pub(crate) fn new(sender: UnboundedSender<(Moment, Input)>, clock: Clock) -> Self {
        Self { sender, clock }
    }

    /// Tells a fact, with the moment at which it became one. After the driver's end nobody listens,
    /// and nothing is lost.
    pub(crate) fn tell(&self, input: Input) {
        drop(self.sender.send((self.clock.now(), input)));
    }
}

type Order<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread that owns an `S`.
#[derive(Debug)]
pub(crate) struct Worker<S> {
    orders: mpsc::Sender<Order<S>>,
    facts: Facts,
    thread: thread::JoinHandle<S>,
}

impl<S: Send + 'static> Worker<S> {
    /// Starts the thread `name`.
    pub(crate) fn start(name: &str, state: S, facts: Facts) -> std::io::Result<Self> {
        let (orders, todo) = mpsc::channel::<Order<S>>();
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let mut state = state;
                for order in todo {
                    order(&mut state);
                }
                state
            })?;
        Ok(Self {
            orders,
            facts,
            thread,
        })
    }

    /// Orders `work`. What it returns is told as a fact, an error as the failure of `step`.
    pub(crate) fn order<E>(
        &self,
        step: Step,
        work: impl FnOnce(&mut S) -> Result<Input, E> + Send + 'static,
    ) where
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let facts = self.facts.clone();
        let order: Order<S> = Box::new(move |state| {
            facts.tell(guarded(step, || work(state)).unwrap_or_else(Input::Failed));
        });
        // The thread ends only when this sender is dropped.
        drop(self.orders.send(order));
    }

    /// Lets the thread finish its orders, and gives back what it owned; nothing when it died.
    pub(crate) fn finish(self) -> Option<S> {
        drop(self.orders);
        self.thread.join().ok()
    }
}

/// Does `work`, as part of `step`. A panic is a failure like any other.
pub(crate) fn guarded<T, E>(step: Step, work: impl FnOnce() -> Result<T, E>) -> Result<T, Failure>
where
    E: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| Failure::new(step, error)),
        Err(panic) => Err(Failure::new(step, message(&*panic))),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("it panicked: {}", text.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[test]
    fn a_moment_beyond_all_clocks_is_far_off() {
        let far = Clock::start().instant(Moment(Duration::MAX));
        assert!(far > Instant::now() + FAR / 2);
    }

    #[test]
    fn orders_run_in_order_and_panics_are_failures() {
        let (sender, mut facts) = unbounded_channel();
        let worker = Worker::start("test", 0_u64, Facts::new(sender, Clock::start())).unwrap();
        worker.order(Step::Save, |count| {
            *count += 1;
            Ok::<_, String>(Input::Flushed)
        });
        worker.order(Step::Pause, |_| -> Result<Input, String> { panic!("boom") });
        worker.order(Step::Flush, |_| -> Result<Input, String> {
            Err("no".into())
        });
        assert_eq!(worker.finish(), Some(1));
        let told: Vec<_> = std::iter::from_fn(|| facts.try_recv().ok())
            .map(|(_, input)| match input {
                Input::Failed(failure) => format!("{:?}: {}", failure.step, failure.source),
                input => format!("{input:?}"),
            })
            .collect();
        assert_eq!(told, ["Flushed", "Pause: it panicked: boom", "Flush: no"]);
    }
}
