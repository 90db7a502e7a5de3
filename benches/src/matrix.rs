//! The whole comparison: cases one after the other, and in each the ways in turn.
//!
//! Whatever the machine does meanwhile, it does to all ways. Each maker has guests of its own, one
//! for each kind of memory, so that none inherits how another left the page tables; while one moves
//! the others rest.

use std::fmt;
use std::process::Command;

use ferry_testbed::{TestbedError, ferry_binary};

use crate::case::{Case, Conditions, Field};
use crate::clean_round;
use crate::course::{Carry, Course};
use crate::figures::{CaseFigures, Figures, Series, mib};
use crate::guest::{Guest, Own, Verifies};
use crate::host::{Host, memory_mib};
use crate::hosts::{self, Pair, There};
use crate::peer::{Memory, Peer};

/// What a machine needs besides guest RAM, and what is left to others.
const SPARE_MIB: u64 = 2048;

/// RAM that a guest has in use besides its data: its kernel and QEMU.
const GUEST_SYSTEM_MIB: u64 = 256;

/// What to compare.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The cases.
    pub cases: Vec<Case>,
    /// Whether they are the small ones.
    pub quick: bool,
    /// The ways; without, those that each case names.
    pub peers: Option<Vec<Peer>>,
    /// Moves by each way.
    pub runs: usize,
    /// Moves by plain `ferry` at the least in the cases whose longest blackout is judged.
    pub least_ferry_moves: usize,
    /// The target's host, where that is another.
    pub there: Option<There>,
    /// The user's own guest, in place of the testbed's.
    pub own: Option<Own>,
    /// After whose moves a guest on this machine verifies its memory.
    pub verifies: Verifies,
}

/// Whose guest it is: Ferry's or QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Camp {
    is_qemu: bool,
    memory: Memory,
}

impl Camp {
    /// What its guest may take at rest, and again at its target, in MiB.
    fn needs_mib(self, conditions: &Conditions) -> u64 {
        // QEMU reads all of a guest's RAM, and to read a hole of a file is to allocate it.
        let all = conditions.preallocated || self.is_qemu && self.memory == Memory::SharedFile;
        if all {
            conditions.guest_mib
        } else {
            conditions.data_mib
        }
        .saturating_add(GUEST_SYSTEM_MIB)
    }
}

impl fmt::Display for Camp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whose = if self.is_qemu { "QEMU's" } else { "Ferry's" };
        write!(f, "{whose} guest with {} memory", self.memory)
    }
}

impl Plan {
    /// Measures it all; shows what there is after each case, as the next may come to nothing.
    pub fn measure<E: From<TestbedError>>(
        &self,
        mut show: impl FnMut(&Figures) -> Result<(), E>,
    ) -> Result<Figures, E> {
        let mut figures = Figures {
            host: Host::here()?,
            target_host: self.there.as_ref().map(hosts::describe).transpose()?,
            runs: self.runs,
            quick: self.quick,
            planned: self.cases.iter().map(|case| case.name.into()).collect(),
            cases: Vec::new(),
            left_out: Vec::new(),
        };
        let has_lanes = ferry_has_lanes()?;
        if !has_lanes {
            let without = "ferry:LANES: this ferry has no --parallel-connections".into();
            figures.left_out.push(without);
        }
        for case in &self.cases {
            let peers = self
                .peers_of(case)
                .into_iter()
                .filter(|peer| has_lanes || !matches!(peer, Peer::FerryOver { .. }));
            let mut measuring = Measuring::new(self, case, peers);
            if self.there.is_none() {
                measuring.leave_out_what_does_not_fit(&mut figures.left_out);
            }
            figures.cases.push(measuring.measure(self.runs));
            show(&figures)?;
        }
        Ok(figures)
    }

    fn peers_of(&self, case: &Case) -> Vec<Peer> {
        match (&self.peers, case.field) {
            // A guest that is busy may stand still for other reasons.
            (Some(peers), Field::Everyone) => {
                let with_copy = |peer: &&Peer| **peer != Peer::Switchover;
                peers.iter().filter(with_copy).copied().collect()
            }
            (Some(peers), Field::Switchover) => peers.clone(),
            (None, Field::Everyone) => Peer::everyone(),
            (None, Field::Switchover) => vec![Peer::Ferry, Peer::Switchover, Peer::Precopy],
        }
    }
}

/// A case under way.
struct Measuring<'a> {
    plan: &'a Plan,
    case: &'a Case,
    series: Vec<Series>,
    courses: Vec<(Camp, Box<dyn Carry>)>,
}

impl<'a> Measuring<'a> {
    fn new(plan: &'a Plan, case: &'a Case, peers: impl Iterator<Item = Peer>) -> Self {
        // One guest for all: no two QEMUs may run on the user's image.
        let memories = |peer: Peer| match plan.own {
            Some(_) => &[Memory::SharedFile],
            None => peer.memories(),
        };
        let series = |peer: Peer| {
            memories(peer).iter().map(move |&memory| Series {
                peer,
                memory,
                moves: Vec::new(),
                failures: Vec::new(),
            })
        };
        Self {
            plan,
            case,
            series: peers.flat_map(series).collect(),
            courses: Vec::new(),
        }
    }

    fn camp(&self, series: &Series) -> Camp {
        Camp {
            is_qemu: series.peer.is_qemu() && self.plan.own.is_none(),
            memory: series.memory,
        }
    }

    fn course(&self, memory: Memory) -> Result<Box<dyn Carry>, TestbedError> {
        let guest = Guest {
            conditions: self.case.conditions,
            memory,
            own: self.plan.own.clone(),
            verifies: self.plan.verifies,
        };
        Ok(match &self.plan.there {
            None => Box::new(Course::begin(guest)?),
            Some(there) => Box::new(Pair::connect(guest, there.clone())?),
        })
    }

    /// Drops the camp that needs most until the rest fits into this machine's memory.
    fn leave_out_what_does_not_fit(&mut self, left_out: &mut Vec<String>) {
        loop {
            let camps = self.camps();
            let needs = |camp: &Camp| camp.needs_mib(&self.case.conditions);
            let greatest = camps.iter().copied().max_by_key(needs);
            // All rest but one, and that one is in two places.
            let sum: u64 = camps.iter().map(needs).sum();
            let needed = sum + greatest.as_ref().map_or(0, needs) + SPARE_MIB;
            let there = memory_mib("MemAvailable");
            let Some(greatest) = greatest.filter(|_| needed > there) else {
                return;
            };
            left_out.push(format!(
                "{}: {needed} MiB of RAM needed, {there} available",
                self.leave_out(greatest)
            ));
        }
    }

    /// Drops a camp, and tells which ways those were.
    fn leave_out(&mut self, camp: Camp) -> String {
        let all = std::mem::take(&mut self.series);
        let (dropped, kept): (Vec<_>, Vec<_>) = all
            .into_iter()
            .partition(|series| self.camp(series) == camp);
        self.series = kept;
        let ways: Vec<_> = dropped.iter().map(|it| it.peer.to_string()).collect();
        format!("{}: {camp}: {}", self.case.name, ways.join(", "))
    }

    fn camps(&self) -> Vec<Camp> {
        let mut camps = Vec::new();
        for series in &self.series {
            let camp = self.camp(series);
            if !camps.contains(&camp) {
                camps.push(camp);
            }
        }
        camps
    }

    fn measure(mut self, runs: usize) -> CaseFigures {
        eprintln!("{}: {}", self.case.name, self.case.what);
        for run in 0..runs {
            for turn in 0..self.series.len() {
                // Nobody is always the first.
                let at = (run + turn) % self.series.len();
                let moves = match self.series[at].peer {
                    Peer::Ferry => self.case.ferry_moves_of(runs, self.plan.least_ferry_moves),
                    _ => 1,
                };
                for _ in 0..moves {
                    self.carry(at);
                }
            }
        }
        let ours = self.courses.iter().find(|(camp, _)| !camp.is_qemu);
        let clean_round = ours
            .and_then(|(_, course)| course.resting())
            .map(clean_round::measure);
        // It is one figure of many: its failure leaves the rest.
        let (clean_round_ms_per_gib, problems) = told_apart(clean_round);
        CaseFigures {
            name: self.case.name.to_owned(),
            what: self.case.what.to_owned(),
            conditions: self.case.conditions,
            series: self.series,
            clean_round_ms_per_gib,
            problems,
        }
    }

    /// One move. One that fails ends its guest and is noted; the next begins with a fresh one.
    fn carry(&mut self, at: usize) {
        let peer = self.series[at].peer;
        let camp = self.camp(&self.series[at]);
        let place = self.courses.iter().position(|(of, _)| *of == camp);
        // Taken out: whoever fails is not put back.
        let course = match place {
            Some(place) => Ok(self.courses.swap_remove(place).1),
            None => self.course(camp.memory),
        };
        let carried = course.and_then(|mut course| {
            let moved = course.carry(peer)?;
            self.courses.push((camp, course));
            Ok(moved)
        });
        let series = &mut self.series[at];
        match carried {
            Ok(moved) => {
                eprintln!(
                    "  {:<22} total {:>8.0} ms, blackout {:>7.1} ms, {:>6.0} MiB",
                    series.label(),
                    moved.to_the_end_ms(),
                    moved.blackout_ms,
                    mib(moved.wire_bytes),
                );
                series.moves.push(moved);
            }
            Err(error) => {
                eprintln!("  {:<22} FAILED: {error}", series.label());
                series.failures.push(error.to_string());
            }
        }
    }
}

/// A round's figure, and the problem with it.
fn told_apart(clean_round: Option<Result<f64, TestbedError>>) -> (Option<f64>, Vec<String>) {
    match clean_round {
        None => (None, Vec::new()),
        Some(Ok(ms)) => (Some(ms), Vec::new()),
        Some(Err(error)) => {
            let problem = format!("a round with nothing dirty: {error}");
            eprintln!("  NOT MEASURED: {problem}");
            (None, vec![problem])
        }
    }
}

fn ferry_has_lanes() -> Result<bool, TestbedError> {
    let help = Command::new(ferry_binary()?)
        .args(["migrate", "--help"])
        .output()
        .map_err(TestbedError::io("start ferry"))?;
    Ok(String::from_utf8_lossy(&help.stdout).contains("--parallel-connections"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_that_fails_is_a_problem_of_its_own() {
        let (ms, problems) = told_apart(Some(Err(crate::guest::failed("a tracker", "no"))));
        assert_eq!((ms, problems.len()), (None, 1));
        assert_eq!(told_apart(Some(Ok(0.5))), (Some(0.5), Vec::new()));
    }

    #[test]
    fn what_is_left_out_is_told_by_its_name() {
        let case = Case::all()[0];
        let plan = Plan {
            cases: vec![case],
            quick: false,
            peers: None,
            runs: 1,
            least_ferry_moves: 0,
            there: None,
            own: None,
            verifies: Verifies::All,
        };
        let peers = [Peer::Ferry, Peer::FerryOver { lanes: 2 }, Peer::Precopy];
        let mut measuring = Measuring::new(&plan, &case, peers.into_iter());
        let [ours, private, file] = measuring.camps()[..] else {
            panic!("{:?}", measuring.camps());
        };
        assert_eq!(
            measuring.leave_out(file),
            "idle: QEMU's guest with shared-file memory: precopy"
        );
        assert_eq!(measuring.camps(), [ours, private]);
        assert_eq!(
            measuring.leave_out(ours),
            "idle: Ferry's guest with shared-file memory: ferry, ferry:2"
        );
        assert_eq!(measuring.camps(), [private]);
    }
}
