//! What more than one state orders or works out, on what they share.

use std::time::Duration;

use ferry_stream::message::{Features, Hello, Message, Mode, Offer, Purpose, RegionInfo, Versions};

use super::postcopy::Postcopy;
use super::slowing::Slowing;
use super::{Link, Shared, SourceConfig, State};
use crate::core::converge::{Verdict, View};
use crate::core::message::{Action, GuestLeft, Moment, Notice, Outcome, Reason, Record};
use crate::core::meter::Meter;
use crate::core::pageset::PageSet;
use crate::core::postcopy::Way;

impl Shared {
    /// The guest stands. A pause that somebody undid before it was known here does not count.
    pub(super) fn hold(&mut self, at: Moment) {
        if self.hold_ordered {
            self.held = Some(at);
            // The guest would pay for a limit with its time. Without `--live` it was known to.
            if self.asked == Mode::Live {
                self.actions.push_back(Action::Unpace);
            }
            self.meter.stopped(at);
        }
    }

    pub(super) fn hello(&self) -> Hello {
        let regions = self.inventory.layout.iter().map(|(_, region)| RegionInfo {
            name: region.name.clone(),
            bytes: region.bytes,
            backing_page_bytes: region.backing_page_bytes,
        });
        Hello {
            versions: Versions::OURS,
            features: self.offered_features(),
            session: self.config.session,
            purpose: Purpose::Migrate,
            offer: Some(Offer {
                arch: self.inventory.arch.clone(),
                machine: self.inventory.machine.clone(),
                vmm: self.inventory.vmm.clone(),
                regions: regions.collect(),
                lanes: self.config.lanes.most().get(),
                mode: self.config.mode,
            }),
        }
    }

    /// What a target may choose from.
    pub(super) fn offered_features(&self) -> Features {
        match self.config.postcopy {
            Postcopy::Never => self.config.features,
            _ => self.config.features.union(Features::POSTCOPY),
        }
    }

    pub(super) fn send(&mut self, message: Message) {
        if self.link == Link::Up {
            self.actions.push_back(Action::Send(message));
        }
    }

    pub(super) fn tell(&mut self, notice: Notice) {
        self.actions.push_back(Action::Tell(notice));
    }

    pub(super) fn journal(&mut self, record: Record) {
        self.journaling.push_back(record);
        self.actions.push_back(Action::Journal(record));
    }

    /// Bounds what comes next by `limit` from now.
    pub(super) fn bound(&mut self, limit: Duration) {
        self.deadline = Some((self.now.after(limit), limit));
    }

    /// Bounds how long pages may stand still with the guest being handed over. A guest that stood for the
    /// copy before is not hurried.
    pub(super) fn bound_standing(&mut self) {
        let limits = &self.config.limits;
        let limit = match self.held {
            // Who accepts a longer blackout accepts slower links.
            None => {
                let accepted = self.config.downtime_limit.saturating_mul(2);
                limits.standing.max(accepted.min(limits.draining))
            }
            Some(_) => limits.draining,
        };
        self.bound(limit);
    }

    pub(super) fn unbound(&mut self) {
        self.deadline = None;
    }

    /// An empty set for a collection to fill.
    pub(super) fn blank_set(&self) -> PageSet {
        PageSet::empty(&self.inventory.layout)
    }

    pub(super) fn collect(&mut self) {
        let into = self.blank_set();
        self.meter.collecting(self.now);
        self.actions.push_back(Action::Collect { into });
    }

    pub(super) fn view(&self, dirty_pages: u64) -> View<'_> {
        let Self { config, meter, .. } = self;
        view(
            config,
            meter,
            &self.slowing,
            self.way,
            self.now,
            dirty_pages,
        )
    }

    /// What the rule says to `dirty_pages` left to send.
    pub(super) fn verdict(&mut self, dirty_pages: u64) -> Verdict {
        let Self { config, meter, .. } = self;
        let view = view(
            config,
            meter,
            &self.slowing,
            self.way,
            self.now,
            dirty_pages,
        );
        self.converge.decide(&view)
    }

    /// What the rule says within a round, with so many pages dirty by now, and so much written.
    pub(super) fn verdict_within(&mut self, dirty_pages: u64, written_bytes_per_s: u64) -> Verdict {
        let Self { config, meter, .. } = self;
        let view = View {
            written_bytes_per_s,
            within_round: true,
            ..view(
                config,
                meter,
                &self.slowing,
                self.way,
                self.now,
                dirty_pages,
            )
        };
        self.converge.decide(&view)
    }

    pub(super) fn finish(&mut self, outcome: Outcome) -> State {
        self.unbound();
        self.timeout = None;
        self.actions.push_back(Action::Finish(outcome));
        State::Ended
    }

    /// The peer would not have it, or could not be understood: nothing has been changed yet.
    pub(super) fn refuse(&mut self, reason: Reason) -> State {
        self.send(reason.abort());
        self.finish(Outcome::Kept {
            reason,
            guest: GuestLeft::Untouched,
        })
    }
}

fn view<'a>(
    config: &SourceConfig,
    meter: &'a Meter,
    slowing: &Slowing,
    way: Way,
    now: Moment,
    dirty_pages: u64,
) -> View<'a> {
    View {
        rounds: meter.rounds(),
        dirty_pages,
        rate_bytes_per_s: meter.rate(now),
        dirty_bytes_per_s: meter.dirty_rate(),
        throttled_percent: slowing.percent(),
        may_throttle: slowing.has_more(),
        may_hand_over: way == Way::Open,
        written_bytes_per_s: meter.written(),
        within_round: false,
        vmm: config.switchover_floor,
        scan: meter.scan(),
        latency: meter.latency(),
        limit: config.downtime_limit,
    }
}
