//! The cases: a guest, what it does, and what lies between the two hosts.

use ferry_testbed::{Content, Pattern};
use serde::{Deserialize, Serialize};

/// What lies between source and target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Wire {
    /// A loopback interface of its own.
    Loopback,
    /// Whatever network is between two hosts.
    Hosts,
    /// Two network namespaces, and between them a token bucket of this rate.
    Link {
        /// Its rate in Mbit a second.
        mbit_per_s: u32,
    },
}

/// In which order the guest rewrites pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// All pages alike.
    Uniform,
    /// 90 % of the writes go to 5 % of the pages.
    Hot,
}

impl From<Order> for Pattern {
    fn from(order: Order) -> Self {
        match order {
            Order::Uniform => Self::Uniform,
            Order::Hot => Self::Hot,
        }
    }
}

/// What the guest's pages hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bytes {
    /// What does not compress.
    Random,
    /// What compresses about as text does.
    Text,
}

impl From<Bytes> for Content {
    fn from(bytes: Bytes) -> Self {
        match bytes {
            Bytes::Random => Self::Random,
            Bytes::Text => Self::Text,
        }
    }
}

/// What a machine has besides CPUs and RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Equipment {
    /// Nothing.
    Bare,
    /// A network card, a disk that the guest writes and verifies all the time, a source of random
    /// numbers, a tablet and a screen.
    Full,
}

/// The guest and the conditions: the same for every way of moving it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conditions {
    /// What the data goes over.
    pub wire: Wire,
    /// Guest RAM in MiB.
    pub guest_mib: u64,
    /// Of that, filled with data.
    pub data_mib: u64,
    /// What the data is.
    pub bytes: Bytes,
    /// Pages rewritten a second. A guest that rewrites none sleeps nearly all the time; one that
    /// does verifies its memory all the time in between and never sleeps.
    pub writes_per_s: u64,
    /// Which.
    pub order: Order,
    /// The downtime limit of every way, in ms.
    pub downtime_limit_ms: u64,
    /// Whether the target's RAM is allocated before the clock starts.
    pub preallocated: bool,
    /// The guest's CPUs, each with a thread that writes and verifies.
    pub cpus: u32,
    /// What the machine has besides.
    pub equipment: Equipment,
}

impl Conditions {
    /// Loopback, a guest of 2 GiB with 1 GiB of random data, idle, RAM allocated before.
    const PLAIN: Self = Self {
        wire: Wire::Loopback,
        guest_mib: 2048,
        data_mib: 1024,
        bytes: Bytes::Random,
        writes_per_s: 0,
        order: Order::Uniform,
        downtime_limit_ms: 100,
        preallocated: true,
        cpus: 1,
        equipment: Equipment::Bare,
    };

    const WRITES: Self = Self {
        writes_per_s: 5000,
        downtime_limit_ms: 20,
        ..Self::PLAIN
    };

    const LINK: Self = Self {
        wire: Wire::Link { mbit_per_s: 1000 },
        guest_mib: 1024,
        data_mib: 512,
        ..Self::WRITES
    };

    /// Whether the guest ever sleeps.
    pub fn is_idle(&self) -> bool {
        self.writes_per_s == 0
    }
}

/// Which ways a case compares when nobody says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// All of them.
    Everyone,
    /// Ferry, QEMU's precopy, and a switchover with nothing to copy.
    Switchover,
}

/// A named set of conditions.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Its name on the command line and in the baseline.
    pub name: &'static str,
    /// What it is, in a few words.
    pub what: &'static str,
    /// The conditions.
    pub conditions: Conditions,
    /// Who takes part.
    pub field: Field,
    /// Moves by plain `ferry` for each move by another way: more where a limit must never be missed.
    pub ferry_moves: usize,
}

impl Case {
    const fn new(name: &'static str, what: &'static str, conditions: Conditions) -> Self {
        Self {
            name,
            what,
            conditions,
            field: Field::Everyone,
            ferry_moves: 1,
        }
    }

    const fn limit_counts(mut self) -> Self {
        self.ferry_moves = 2;
        self
    }

    /// Moves by plain `ferry` for each of `runs` moves by another way, so that where a limit must never
    /// be missed there are `least` in the end.
    pub fn ferry_moves_of(&self, runs: usize, least: usize) -> usize {
        let is_limit_judged = self.ferry_moves > 1;
        if is_limit_judged && runs > 0 {
            self.ferry_moves.max(least.div_ceil(runs))
        } else {
            self.ferry_moves
        }
    }

    /// The whole matrix.
    pub fn all() -> Vec<Self> {
        let plain = Conditions::PLAIN;
        let writes = Conditions::WRITES;
        let link = Conditions::LINK;
        vec![
            Self::new("idle", "loopback, idle", plain),
            Self::new(
                "idle-cold",
                "loopback, idle, target RAM not preallocated",
                Conditions {
                    preallocated: false,
                    ..plain
                },
            ),
            Self::new("writes", "loopback, 5,000 writes/s", writes).limit_counts(),
            Self::new(
                "hot",
                "loopback, 5,000 writes/s to a hot set",
                Conditions {
                    order: Order::Hot,
                    ..writes
                },
            ),
            Self::new(
                "text",
                "loopback, text-like, 5,000 writes/s",
                Conditions {
                    bytes: Bytes::Text,
                    ..writes
                },
            ),
            Self::new("link", "1 Gbit/s, 5,000 writes/s", link).limit_counts(),
            Self::new(
                "link-text",
                "1 Gbit/s, text-like, 5,000 writes/s",
                Conditions {
                    bytes: Bytes::Text,
                    ..link
                },
            ),
            Self::large(),
            Self::blackout(),
            Self::new(
                "devices",
                "loopback, 2 CPUs, disk in use, network, screen",
                Conditions {
                    downtime_limit_ms: 100,
                    cpus: 2,
                    equipment: Equipment::Full,
                    ..writes
                },
            ),
        ]
    }

    fn large() -> Self {
        Self::new(
            "large",
            "loopback, idle, 8 GiB guest with 256 MiB in use",
            Conditions {
                guest_mib: 8192,
                data_mib: 256,
                preallocated: false,
                ..Conditions::PLAIN
            },
        )
    }

    fn blackout() -> Self {
        Self {
            field: Field::Switchover,
            ..Self::new(
                "blackout",
                "loopback, idle, the smallest blackout that can be had",
                Conditions {
                    downtime_limit_ms: 5,
                    ..Conditions::PLAIN
                },
            )
        }
    }

    /// Those that mean something between two hosts, over the network that is there.
    pub fn between_hosts() -> Vec<Self> {
        let is_here = |case: &Self| {
            let conditions = &case.conditions;
            conditions.wire == Wire::Loopback
                && conditions.equipment == Equipment::Bare
                && case.field == Field::Everyone
        };
        let there = |case: Self| Self {
            conditions: Conditions {
                wire: Wire::Hosts,
                ..case.conditions
            },
            ..case
        };
        Self::all().into_iter().filter(is_here).map(there).collect()
    }

    /// The user's own guest, of which nothing is known.
    pub fn own(guest_mib: u64, downtime_limit_ms: u64, wire: Wire) -> Self {
        Self::new(
            "own",
            "a guest of one's own; figures from QEMU's events",
            Conditions {
                wire,
                guest_mib,
                data_mib: guest_mib,
                downtime_limit_ms,
                ..Conditions::PLAIN
            },
        )
    }

    /// Of these, a few, and small, for a run of a few minutes: what they tell is whether everything works.
    pub fn quick(all: &[Self]) -> Vec<Self> {
        let small = |case: &Self| Self {
            conditions: Conditions {
                guest_mib: 512,
                data_mib: 128,
                ..case.conditions
            },
            ferry_moves: 1,
            ..*case
        };
        let is_quick = |case: &&Self| ["writes", "link-text", "blackout"].contains(&case.name);
        all.iter().filter(is_quick).map(small).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_runs_are_made_up_for_where_the_longest_blackout_is_judged() {
        let cases = Case::all();
        let case = |name| cases.iter().find(|case| case.name == name).unwrap();
        let moves = |name, runs| runs * case(name).ferry_moves_of(runs, 10);
        for runs in [1, 3, 5] {
            assert!(moves("writes", runs) >= 10, "{runs}");
            assert_eq!(moves("idle", runs), runs);
        }
        assert_eq!(case("writes").ferry_moves_of(3, 0), 2);
        let quick = Case::quick(&cases);
        assert!(quick.iter().all(|case| case.ferry_moves_of(2, 10) == 1));
    }
}
