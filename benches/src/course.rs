//! One guest, carried from QEMU to QEMU on this machine.

use std::time::Duration;

use ferry_testbed::{Disk, End, Link, Machine, Populate, Qemu, StatusPage, TestbedError};
use serde_json::json;

use crate::case::Wire;
use crate::cost::Account;
use crate::figures::{EngineFigures, Move};
use crate::guest::{BOUND, Guest, failed};
use crate::peer::Peer;
use crate::watch::Watch;
use crate::way::{Departure, Place, wait};

/// Something that moves a guest, again and again.
pub trait Carry {
    /// Moves it once, and tells what that was like.
    fn carry(&mut self, peer: Peer) -> Result<Move, TestbedError>;

    /// A QEMU on this machine in which the guest rests, if it is here.
    fn resting(&self) -> Option<&Qemu>;
}

/// A guest under way. Between two moves it rests.
pub struct Course {
    guest: Guest,
    machine: Machine,
    link: Link,
    /// At which end of the link the guest is: it goes there and back.
    end: End,
    here: Qemu,
    /// Where it counts, if it does.
    page: Option<StatusPage>,
    /// Shared by source and target, and gone with the course.
    _disk: Option<Disk>,
}

impl Course {
    /// Boots the guest and lets it rest.
    pub fn begin(guest: Guest) -> Result<Self, TestbedError> {
        let disk = guest.disk()?;
        let machine = guest.machine(disk.as_ref())?;
        let link = match guest.conditions.wire {
            Wire::Loopback => Link::loop_back()?,
            Wire::Link { mbit_per_s } => Link::lay(mbit_per_s)?,
            Wire::Hosts => return Err(failed("the case", "it needs two hosts")),
        };
        let end = End::Source;
        let here = Place::Link(&link, end).start(&machine)?;
        let page = guest.wait_for_work(&here)?;
        let course = Self {
            guest,
            machine,
            link,
            end,
            here,
            page,
            _disk: disk,
        };
        course.rest()?;
        Ok(course)
    }

    fn measure(
        &self,
        peer: Peer,
        target: &Qemu,
        arrived: Option<&StatusPage>,
    ) -> Result<Move, TestbedError> {
        let departure = Departure {
            source: &self.here,
            place: Place::Link(&self.link, self.end),
            limit: Duration::from_millis(self.guest.conditions.downtime_limit_ms),
        };
        departure.prepare(peer)?;
        let waiting = wait(peer, target, Place::Link(&self.link, self.end.other()))?;
        if peer != Peer::Switchover {
            self.guest.check_untouched(target)?;
        }
        self.wake()?;
        let qemus = [&self.here, target];
        // On one memory the two counters are one.
        let there = arrived.filter(|_| peer != Peer::Switchover).cloned();
        let pages = self.page.clone().map(|here| (here, there));
        let watch = Watch::start(pages, qemus)?;
        let accounts = [Account::of(&self.here)?, Account::of(target)?];
        let bytes = self.link.carried_bytes()?;
        let gone = departure.go(peer, &waiting.uri)?;
        let receive = waiting.receive.map(|it| it.finish(BOUND)).transpose()?;
        self.guest.wait_for_arrival(target, arrived)?;
        let later = [Account::of(&self.here)?, Account::of(target)?];
        let wire_bytes = self.link.carried_bytes()?.saturating_sub(bytes);
        let seen = watch.finish(peer, &gone.began, gone.last_page(), qemus)?;
        let engines = [&gone.engine, &receive];
        let [source, target] = [0, 1].map(|side| {
            let engine = engines[side].as_ref();
            let cpu = engine.map_or(Duration::ZERO, |used| used.cpu);
            accounts[side].until(&later[side], cpu)
        });
        let engine = gone
            .engine
            .zip(receive)
            .map(|(sent, received)| EngineFigures {
                source_peak_kib: sent.peak_kib,
                target_peak_kib: received.peak_kib,
                told: sent.ended.json(),
                told_at_target: received.ended.json(),
            });
        Ok(Move {
            wire_bytes,
            source,
            target,
            engine,
            ..seen
        })
    }

    fn target(&self, peer: Peer) -> Result<Qemu, TestbedError> {
        let machine = self.machine.clone().incoming();
        let machine = match peer {
            Peer::Switchover => machine.on_ram_of(&self.here),
            _ if self.guest.conditions.preallocated => machine.populate(Populate::AtStart),
            _ => machine.populate(Populate::OnDemand),
        };
        Place::Link(&self.link, self.end.other()).start(&machine)
    }

    fn rest(&self) -> Result<(), TestbedError> {
        self.here.execute("stop", &json!({})).map(drop)
    }

    fn wake(&self) -> Result<(), TestbedError> {
        self.here.execute("cont", &json!({})).map(drop)
    }
}

impl Carry for Course {
    fn carry(&mut self, peer: Peer) -> Result<Move, TestbedError> {
        let target = self.target(peer)?;
        let arrived = self.page.as_ref().map(|page| target.counterpart(page));
        let mut figures = self.measure(peer, &target, arrived.as_ref())?;
        // The old QEMU ends here; the next move begins at the new one.
        self.here = target;
        self.end = self.end.other();
        self.page = arrived;
        if let (Some(page), Some(told)) = (&self.page, &mut figures.guest)
            && self.guest.verifies.after(peer)
        {
            told.bad = self.guest.verify(&self.here, page)?;
        }
        self.rest()?;
        Ok(figures)
    }

    fn resting(&self) -> Option<&Qemu> {
        Some(&self.here)
    }
}
