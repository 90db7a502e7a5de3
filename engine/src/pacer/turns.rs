//! Whose turn it is to send: start-time fair queueing, over bytes.
//!
//! Every sender has an account of what it has sent, and among those that wait the one with the smallest
//! is next. So senders that always want more send the same number of bytes, however large the pieces are
//! in which they do; one that wants little waits for nobody's backlog; and one that comes late, or has
//! wanted nothing for a while, has saved up nothing.

use std::collections::BTreeSet;

/// What a sender has sent, in bytes, since a moment that all senders share.
#[derive(Debug, Default)]
pub(crate) struct Account {
    sent: u64,
}

impl Account {
    /// It sent `sent` bytes where it had wanted to send `asked`.
    pub(super) fn correct(&mut self, asked: u64, sent: u64) {
        self.sent = self.sent.saturating_sub(asked).saturating_add(sent);
    }

    #[cfg(test)]
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }
}

/// A sender's place among those that wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Turn {
    /// What its account held.
    sent: u64,
    /// In which order they came.
    number: u64,
}

/// Those that wait.
#[derive(Debug, Default)]
pub(super) struct Turns {
    waiting: BTreeSet<Turn>,
    asked: u64,
    /// The account of the last one whose turn came.
    now: u64,
}

impl Turns {
    /// A sender wants to send `bytes` bytes.
    pub(super) fn ask(&mut self, account: &mut Account, bytes: u64) -> Turn {
        let sent = account.sent.max(self.now);
        account.sent = sent.saturating_add(bytes);
        self.asked += 1;
        let turn = Turn {
            sent,
            number: self.asked,
        };
        self.waiting.insert(turn);
        turn
    }

    /// True when nobody is before it.
    pub(super) fn is_next(&self, turn: Turn) -> bool {
        self.waiting.first() == Some(&turn)
    }

    /// The sender goes, or does not want to any more.
    pub(super) fn leave(&mut self, turn: Turn) {
        if self.is_next(turn) {
            self.now = self.now.max(turn.sent);
        }
        self.waiting.remove(&turn);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sender that always wants more, in pieces of its own sizes.
    struct Hungry {
        account: Account,
        sizes: Vec<u64>,
        pieces: usize,
        turn: Turn,
        sent: u64,
    }

    impl Hungry {
        fn new(turns: &mut Turns, sizes: Vec<u64>) -> Self {
            let mut account = Account::default();
            let turn = turns.ask(&mut account, sizes[0]);
            Self {
                account,
                sizes,
                pieces: 0,
                turn,
                sent: 0,
            }
        }

        fn size(&self) -> u64 {
            self.sizes[self.pieces % self.sizes.len()]
        }

        /// Its turn has come.
        fn go(&mut self, turns: &mut Turns) {
            turns.leave(self.turn);
            self.sent += self.size();
            self.pieces += 1;
            let bytes = self.size();
            self.turn = turns.ask(&mut self.account, bytes);
        }
    }

    fn serve(turns: &mut Turns, senders: &mut [Hungry]) {
        let next = senders
            .iter_mut()
            .find(|sender| turns.is_next(sender.turn))
            .expect("every sender waits");
        next.go(turns);
    }

    fn sizes() -> impl Strategy<Value = Vec<u64>> {
        prop::collection::vec(1..1_000_000_u64, 1..6)
    }

    proptest! {
        /// At no moment has one sent more than another by more than a piece of each.
        #[test]
        fn appetites_do_not_count(all in prop::collection::vec(sizes(), 2..20)) {
            let largest = *all.iter().flatten().max().unwrap();
            let mut turns = Turns::default();
            let mut senders: Vec<_> =
                all.into_iter().map(|sizes| Hungry::new(&mut turns, sizes)).collect();
            for _ in 0..500 {
                serve(&mut turns, &mut senders);
                let most = senders.iter().map(|sender| sender.sent).max().unwrap();
                let least = senders.iter().map(|sender| sender.sent).min().unwrap();
                prop_assert!(most - least <= 2 * largest, "{least} to {most}");
            }
        }

        /// Who comes late gets the same as the others from then on, and not what it has missed.
        #[test]
        fn who_comes_late_has_saved_up_nothing(
            all in prop::collection::vec(sizes(), 1..6),
            late in sizes(),
        ) {
            let largest = *all.iter().flatten().chain(&late).max().unwrap();
            let mut turns = Turns::default();
            let mut senders: Vec<_> =
                all.into_iter().map(|sizes| Hungry::new(&mut turns, sizes)).collect();
            (0..200).for_each(|_| serve(&mut turns, &mut senders));
            for sender in &mut senders {
                sender.sent = 0;
            }
            senders.push(Hungry::new(&mut turns, late));
            for _ in 0..500 {
                serve(&mut turns, &mut senders);
                let most = senders.iter().map(|sender| sender.sent).max().unwrap();
                let least = senders.iter().map(|sender| sender.sent).min().unwrap();
                prop_assert!(most - least <= 3 * largest, "{least} to {most}");
            }
        }
    }

    #[test]
    fn who_wants_little_waits_for_one_piece_of_each() {
        let mut turns = Turns::default();
        let mut hungry: Vec<_> = (0..4)
            .map(|_| Hungry::new(&mut turns, vec![1_000_000]))
            .collect();
        let mut modest = Account::default();
        for _ in 0..20 {
            (0..50).for_each(|_| serve(&mut turns, &mut hungry));
            let turn = turns.ask(&mut modest, 1);
            let mut before = 0;
            while !turns.is_next(turn) {
                serve(&mut turns, &mut hungry);
                before += 1;
            }
            turns.leave(turn);
            assert!(before <= hungry.len(), "{before} went before");
        }
    }

    #[test]
    fn who_leaves_holds_up_nobody() {
        let mut turns = Turns::default();
        let (mut one, mut two) = (Account::default(), Account::default());
        let gone = turns.ask(&mut one, 10);
        let next = turns.ask(&mut two, 10);
        assert!(turns.is_next(gone) && !turns.is_next(next));
        turns.leave(gone);
        assert!(turns.is_next(next));
    }
}
