//! Taking the memory of pages out of a file, to the last of them.

use std::io;
use std::iter::Peekable;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::FaultRange;
use crate::linux::{Error, RamFile};

/// Longest time for which a page that stays is tried again, in milliseconds: a guest is waiting.
const LIMIT_MS: u64 = 100;

/// Discards `runs`, bytes of the file of `part` in order, each end before the next start; and what lies
/// between them where it holds nothing.
///
/// It is left to the kernel, in one call, to see that there is nothing to discard: where the file has a
/// hole, as far as it tells, there may be memory that was allocated and never written, which would be
/// read as zeros, with nobody waiting.
pub(super) fn discard(
    part: &FaultRange,
    runs: impl Iterator<Item = Range<u64>>,
) -> Result<(), Error> {
    let failed = |error| Error::call("discarding pages of guest RAM", error);
    let mut runs = runs.peekable();
    let Some(first) = runs.peek() else {
        return Ok(());
    };
    let mut data = first_data(&part.file, first.start).map_err(failed)?;
    while let Some(span) = next_span(&mut runs, data) {
        data = discard_span(&part.file, &span).map_err(failed)?;
        if data < span.end {
            return Err(Error::NotDiscarded {
                name: part.name.clone(),
                start: data,
                limit_ms: LIMIT_MS,
            });
        }
    }
    Ok(())
}

/// The next run, and all that follow it before `data`, the first that there is.
fn next_span(
    runs: &mut Peekable<impl Iterator<Item = Range<u64>>>,
    data: u64,
) -> Option<Range<u64>> {
    let mut span = runs.next()?;
    while span.end <= data
        && let Some(next) = runs.next_if(|next| next.start <= data)
    {
        span.end = next.end;
    }
    Some(span)
}

/// Discards `span` and tells where the first data behind its start is by then: within it, should the
/// kernel have failed to take a page out of a huge one, which it tells nobody. What kept it from that may
/// go away at once.
fn discard_span(file: &RamFile, span: &Range<u64>) -> io::Result<u64> {
    let mut deadline = None;
    loop {
        file.punch(span)?;
        let data = first_data(file, span.start)?;
        if data >= span.end {
            return Ok(data);
        }
        let now = Instant::now();
        if now > *deadline.get_or_insert(now + Duration::from_millis(LIMIT_MS)) {
            return Ok(data);
        }
        thread::yield_now();
    }
}

/// Where the first data at or after `offset` is; behind everything when there is none.
fn first_data(file: &RamFile, offset: u64) -> io::Result<u64> {
    Ok(file.next_data(offset)?.unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans(runs: &[Range<u64>], data: u64) -> Vec<Range<u64>> {
        let mut runs = runs.iter().cloned().peekable();
        std::iter::from_fn(|| next_span(&mut runs, data)).collect()
    }

    #[test]
    fn joins_what_only_holes_part() {
        let runs = [1..2, 3..4, 8..9, 10..12];
        assert_eq!(spans(&runs, u64::MAX), std::slice::from_ref(&(1..12)));
        assert_eq!(spans(&runs, 0), runs);
        assert_eq!(spans(&runs, 5), [1..4, 8..9, 10..12]);
        // The data is the first page of a run, and within one.
        assert_eq!(spans(&runs, 8), [1..9, 10..12]);
        assert_eq!(spans(&runs, 11), std::slice::from_ref(&(1..12)));
        assert_eq!(spans(&[], 5), []);
    }

    proptest! {
        /// Every run is in a span, and no span has data that is in no run.
        #[test]
        fn discards_the_runs_and_no_data(pages in prop::collection::vec(any::<(bool, bool)>(), 1..60)) {
            let is_data = |page: &u64| pages[usize::try_from(*page).unwrap()].0;
            let wanted = |page: &u64| pages[usize::try_from(*page).unwrap()].1;
            let all = 0..pages.len() as u64;
            let runs: Vec<_> = all.clone().filter(&wanted).map(|page| page..page + 1).collect();
            let data = all.clone().find(is_data).unwrap_or(u64::MAX);
            let spans = spans(&runs, data);
            for page in all {
                let within = spans.iter().any(|span| span.contains(&page));
                prop_assert!(within || !wanted(&page));
                prop_assert!(!within || wanted(&page) || !is_data(&page));
            }
        }
    }
}
