//! Agreeing with a source: nothing is changed here before both know that they fit.

use ferry_stream::message::{Features, Hello, Message, Offer, Versions, Welcome};

use super::lanes::Lanes;
use super::receiving::Preparing;
use super::{Shared, State};
use crate::core::layout::{Layout, Region};
use crate::core::message::{Action, GuestLeft, Outcome, Phase, Reason, Record};

/// What a target is able to take. [`Features::NEAR`] is not in a hello that comes here unless the
/// source's RAM is at hand, nor [`Features::POSTCOPY`] unless the VMM can wait for pages.
const FEATURES: Features = Features::LZ4
    .union(Features::ZSTD)
    .union(Features::DELTA)
    .union(Features::NEAR)
    .union(Features::AHEAD)
    .union(Features::POSTCOPY);

impl Shared {
    pub(super) fn greet(&mut self, hello: Hello) -> State {
        let session = hello.session;
        match self.agree(hello) {
            Ok(welcome) => {
                self.session = Some(session);
                self.features = welcome.features;
                self.lanes = Lanes::none_of(welcome.lanes);
                self.send(Message::Welcome(welcome));
                self.journal(Record::Receiving);
                self.actions.push_back(Action::Prepare);
                self.bound(self.config.limits.preparing);
                State::Preparing(Preparing::default())
            }
            Err(reason) => self.turn_away(reason),
        }
    }

    fn agree(&self, hello: Hello) -> Result<Welcome, Reason> {
        let Versions { lowest, highest } = hello.versions;
        let version = Versions::OURS
            .agree(hello.versions)
            .ok_or(Reason::Version { lowest, highest })?;
        let what = "a hello without an offer";
        let offer = hello.offer.ok_or(Reason::Protocol {
            what,
            phase: Phase::Waiting,
        })?;
        let mut reasons = self.machine_differences(&offer);
        let differences = parse_layout(&offer)?.differences(&self.inventory.layout);
        if !differences.is_empty() {
            reasons.push(Reason::Layout(differences));
        }
        if let Some(last) = reasons.pop() {
            return Err(together(reasons, last));
        }
        let lanes = offer.lanes.clamp(1, self.config.lanes.max(1));
        Ok(Welcome {
            version,
            features: hello.features.intersection(FEATURES),
            lanes,
        })
    }

    fn machine_differences(&self, offer: &Offer) -> Vec<Reason> {
        let here = &self.inventory;
        let pairs = [(&offer.arch, &here.arch), (&offer.machine, &here.machine)];
        let different = pairs.iter().filter(|(theirs, ours)| theirs != ours);
        let reasons = different.map(|(theirs, ours)| Reason::Machine {
            ours_or_source: (*theirs).clone(),
            theirs_or_target: (*ours).clone(),
        });
        reasons.collect()
    }

    /// Not a source that can be served: nothing was changed here.
    pub(super) fn turn_away(&mut self, reason: Reason) -> State {
        self.send(reason.abort());
        self.finish(Outcome::Kept {
            reason,
            guest: GuestLeft::Untouched,
        })
    }
}

/// All that does not fit, as one reason.
fn together(mut reasons: Vec<Reason>, last: Reason) -> Reason {
    if reasons.is_empty() {
        return last;
    }
    reasons.push(last);
    Reason::Several(reasons)
}

fn parse_layout(offer: &Offer) -> Result<Layout, Reason> {
    let regions = offer.regions.iter().map(|region| Region {
        name: region.name.clone(),
        bytes: region.bytes,
        backing_page_bytes: region.backing_page_bytes,
    });
    let layout = Layout::new(regions.collect()).map_err(Reason::BadLayout)?;
    let in_order = layout
        .iter()
        .zip(&offer.regions)
        .all(|((_, ours), theirs)| ours.name == theirs.name);
    if in_order {
        Ok(layout)
    } else {
        Err(Reason::Protocol {
            what: "regions out of order",
            phase: Phase::Waiting,
        })
    }
}
