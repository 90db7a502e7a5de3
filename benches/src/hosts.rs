//! Moves between two real hosts: the guest boots here and goes to a host that is reached over ssh.
//!
//! Each move begins with a guest that has just booted, as it does not come back. The two hosts have two
//! clocks: before and after each move the difference is measured over the ssh connection, from the
//! quickest of some round trips, and half of that trip, with whatever the difference has changed
//! meanwhile, is the error that the figures are given with. Bytes are those of the interface by which
//! the other host is reached; what others send there counts.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, ToSocketAddrs as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ferry_testbed::{Probe, Qemu, Seen, TestbedError, interface_bytes};

use crate::agent::{Arrival, Clocks, Reply, Request};
use crate::cost::Account;
use crate::course::Carry;
use crate::figures::{EngineFigures, Move};
use crate::guest::{Guest, failed};
use crate::host::Host;
use crate::peer::Peer;
use crate::watch::{LEAD, between_events, counted, last_event, now_since_epoch};
use crate::way::{Departure, Gone, Place};

/// Round trips of which the quickest tells the time.
const TRIPS: usize = 50;

/// The target's host.
#[derive(Clone, Debug)]
pub struct There {
    /// `user@host`, as ssh takes it.
    pub host: String,
    /// ssh with its options, in words.
    pub ssh: Vec<String>,
    /// What runs there as `benches/run`.
    pub run: String,
    /// Its address for the move.
    pub address: IpAddr,
    /// The interface here by which it is reached.
    pub interface: String,
}

impl There {
    /// Finds out how to reach it.
    pub fn new(
        host: &str,
        ssh: &str,
        run: String,
        address: Option<&str>,
    ) -> Result<Self, TestbedError> {
        let name = host.rsplit_once('@').map_or(host, |(_, name)| name);
        let name = address.unwrap_or(name);
        let what = || TestbedError::io(format!("find the address of {name}"));
        let mut found = (name, 0).to_socket_addrs().map_err(what())?;
        // The targets listen on IPv4.
        let address = found.find_map(|address| address.is_ipv4().then_some(address.ip()));
        let address =
            address.ok_or_else(|| failed(name, "it has no IPv4 address, which moves need"))?;
        Ok(Self {
            host: host.to_owned(),
            ssh: ssh.split_whitespace().map(str::to_owned).collect(),
            run,
            address,
            interface: interface_to(address)?,
        })
    }

    fn carried_bytes(&self) -> Result<u64, TestbedError> {
        let (received, sent) = interface_bytes(&self.interface)?;
        // What loopback sends it receives.
        Ok(match &*self.interface {
            "lo" => sent,
            _ => received + sent,
        })
    }
}

/// The interface by which the kernel would send there.
fn interface_to(address: IpAddr) -> Result<String, TestbedError> {
    let output = Command::new("ip")
        .args(["-o", "route", "get", &address.to_string()])
        .output()
        .map_err(TestbedError::io("start ip (of iproute2)"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut words = text.split_whitespace();
    let name = words.find(|word| *word == "dev").and(words.next());
    name.map(str::to_owned)
        .ok_or_else(|| failed("ip route get", &text))
}

/// A conversation with the agent there. Its end ends the agent, and all that it has started.
struct Agent {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    epoch: Instant,
}

impl Agent {
    fn call(there: &There) -> Result<(Self, Host), TestbedError> {
        let (ssh, options) = there
            .ssh
            .split_first()
            .ok_or_else(|| failed("ssh", "no command was given"))?;
        let mut child = Command::new(ssh)
            .args(options)
            .arg(&there.host)
            .arg(format!("{} --serve", there.run))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(TestbedError::io(format!("start {ssh}")))?;
        let input = child.stdin.take();
        let output = child.stdout.take().expect("its output is a pipe");
        let mut agent = Self {
            child,
            input,
            output: BufReader::new(output),
            epoch: Instant::now(),
        };
        match agent.hear()? {
            Reply::Ready(host) => Ok((agent, *host)),
            other => Err(unexpected(&other)),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, TestbedError> {
        let error = || TestbedError::io("ask the target's host");
        let text = serde_json::to_string(request).map_err(|wrong| error()(wrong.into()))?;
        let input = self.input.as_mut().expect("only drop takes it");
        writeln!(input, "{text}").map_err(error())?;
        match self.hear()? {
            Reply::Failed(why) => Err(failed("the target's host", &why)),
            reply => Ok(reply),
        }
    }

    fn hear(&mut self) -> Result<Reply, TestbedError> {
        loop {
            let mut line = String::new();
            let read = self.output.read_line(&mut line);
            if read.map_err(TestbedError::io("hear the target's host"))? == 0 {
                return Err(failed("the target's host", "the connection ended"));
            }
            // What is set up before the agent runs tells of it.
            if line.starts_with(['{', '"']) {
                return serde_json::from_str(&line)
                    .map_err(|wrong| failed("the target's host", &format!("{wrong}: {line}")));
            }
        }
    }

    /// What must be added to its clocks to have ours.
    fn offset(&mut self) -> Result<Offset, TestbedError> {
        let mut best: Option<Offset> = None;
        for _ in 0..TRIPS {
            let (sent, sent_wall) = (self.epoch.elapsed(), now_since_epoch());
            let Reply::Clock(Clocks {
                steady,
                since_epoch,
            }) = self.ask(&Request::Clock)?
            else {
                return Err(failed("the target's host", "it told no time"));
            };
            let trip_s = (self.epoch.elapsed().saturating_sub(sent)).as_secs_f64();
            let offset = Offset {
                steady_s: sent.as_secs_f64() + trip_s / 2.0 - steady.as_secs_f64(),
                wall_s: sent_wall.as_secs_f64() + trip_s / 2.0 - since_epoch.as_secs_f64(),
                error_s: trip_s / 2.0,
            };
            if best.is_none_or(|best| offset.error_s < best.error_s) {
                best = Some(offset);
            }
        }
        best.ok_or_else(|| failed("the target's host", "it was never asked the time"))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.input.take());
        _ = self.child.wait();
    }
}

fn unexpected(reply: &Reply) -> TestbedError {
    failed("the target's host", &format!("it said {reply:?}"))
}

/// The difference of two hosts' clocks.
#[expect(clippy::struct_field_names, reason = "units stand last in a name")]
#[derive(Clone, Copy, Debug)]
struct Offset {
    steady_s: f64,
    wall_s: f64,
    error_s: f64,
}

impl Offset {
    /// Between two measurements: the mean, and an error that has both within.
    fn between(self, later: Self) -> Self {
        let mean = |one: f64, other: f64| f64::midpoint(one, other);
        let drift = (later.steady_s - self.steady_s).abs();
        let drift = drift.max((later.wall_s - self.wall_s).abs());
        Self {
            steady_s: mean(self.steady_s, later.steady_s),
            wall_s: mean(self.wall_s, later.wall_s),
            error_s: self.error_s.max(later.error_s) + drift / 2.0,
        }
    }
}

/// One guest after the other, from here to there.
pub struct Pair {
    guest: Guest,
    there: There,
    agent: Agent,
}

impl Pair {
    /// Connects.
    pub fn connect(guest: Guest, there: There) -> Result<Self, TestbedError> {
        let (agent, _) = Agent::call(&there)?;
        Ok(Self {
            guest,
            there,
            agent,
        })
    }

    fn measure(&mut self, peer: Peer, source: &Qemu) -> Result<Move, TestbedError> {
        let page = self.guest.wait_for_work(source)?;
        let departure = Departure {
            source,
            place: Place::Host,
            limit: Duration::from_millis(self.guest.conditions.downtime_limit_ms),
        };
        departure.prepare(peer)?;
        let request = Request::Start {
            guest: Box::new(self.guest.clone()),
            peer,
        };
        let Reply::Waiting { uri } = self.agent.ask(&request)? else {
            return Err(failed("the target's host", "it has no target"));
        };
        let uri = uri.replace("0.0.0.0", &self.there.address.to_string());
        let before = self.agent.offset()?;
        let offset = page.as_ref().map(ferry_testbed::StatusPage::offset);
        self.agent.ask(&Request::Watch { page: offset })?;
        let probe = page.map(|page| Probe::start(page, None));
        source.take_events()?;
        std::thread::sleep(LEAD);
        let account = Account::of(source)?;
        let bytes = self.there.carried_bytes()?;
        let gone = departure.go(peer, &uri)?;
        let wire_bytes = self.there.carried_bytes()?.saturating_sub(bytes);
        let cpu = account.until(&Account::of(source)?, Duration::ZERO);
        let Reply::Finished(arrival) = self.agent.ask(&Request::Finish)? else {
            return Err(failed("the target's host", "it told no arrival"));
        };
        let offset = before.between(self.agent.offset()?);
        let seen = probe.map(Probe::finish).transpose()?;
        let times = if let Some(seen) = seen {
            let seen = self.seen_by_both(&seen, &arrival, offset);
            counted(peer, &seen, &gone.began, gone.last_page())?
        } else {
            let resumed = shifted(arrival.resumed, offset.wall_s);
            between_events(last_event(source, "STOP")?, resumed, &gone.began)?
        };
        let mut figures = with_costs(times, gone, &arrival, cpu);
        figures.wire_bytes = wire_bytes;
        figures.clock_error_ms = offset.error_s * 1e3;
        Ok(figures)
    }

    /// Both probes by our clock.
    fn seen_by_both(&self, seen: &Seen, arrival: &Arrival, offset: Offset) -> Seen {
        let started = seen.started.saturating_duration_since(self.agent.epoch);
        let target: Vec<_> = arrival
            .progress
            .iter()
            .map(|&(at, steps)| {
                let ours = shifted(at, offset.steady_s);
                (ours.saturating_sub(started), steps)
            })
            .collect();
        Seen::of_both(seen.started, &seen.progress, &target)
    }
}

fn shifted(at: Duration, by_s: f64) -> Duration {
    Duration::try_from_secs_f64(at.as_secs_f64() + by_s).unwrap_or_default()
}

fn with_costs(times: Move, gone: Gone, arrival: &Arrival, cpu: crate::cost::Cpu) -> Move {
    let mut source = cpu;
    let engine = gone.engine.map(|used| {
        source.migration_s += used.cpu.as_secs_f64();
        EngineFigures {
            source_peak_kib: used.peak_kib,
            target_peak_kib: arrival.peak_kib.unwrap_or_default(),
            told: used.ended.json(),
            told_at_target: serde_json::Value::Null,
        }
    });
    let mut figures = Move {
        source,
        target: arrival.cpu,
        engine,
        ..times
    };
    if let Some(guest) = &mut figures.guest {
        guest.bad = arrival.bad;
    }
    figures
}

impl Carry for Pair {
    fn carry(&mut self, peer: Peer) -> Result<Move, TestbedError> {
        let source = Place::Host.start(&self.guest.machine(None)?)?;
        self.measure(peer, &source)
    }

    fn resting(&self) -> Option<&Qemu> {
        None
    }
}

/// What the target's host is.
pub fn describe(there: &There) -> Result<Host, TestbedError> {
    Agent::call(there).map(|(_, host)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_clock_drifts_is_part_of_the_error() {
        let at = |steady_s, error_s| Offset {
            steady_s,
            wall_s: steady_s,
            error_s,
        };
        let between = at(1.0, 0.001).between(at(1.01, 0.002));
        assert!((between.steady_s - 1.005).abs() < 1e-9);
        assert!((between.error_s - 0.007).abs() < 1e-9);
    }
}
