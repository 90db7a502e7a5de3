//! What a target says on a fetch lane: written and read alike, and nothing else is let through.

use bytes::Bytes;
use ferry_stream::Error;
use ferry_stream::frame::{Generation, Kind};
use ferry_stream::lane::{Request, RequestReader, RequestWriter};
use ferry_stream::limits::{MAX_MAPPED_PAGES, MAX_REGIONS, PAGE_NUMBER_END};
use ferry_stream::message::{Absence, DataRun, LaneId, LaneIndex};
use proptest::prelude::*;

const LANE: LaneId = LaneId {
    index: LaneIndex(3),
    generation: Generation(1),
};

fn written(requests: &[Request]) -> Result<Vec<u8>, Error> {
    let mut wire = Vec::new();
    RequestWriter::new(LANE).send(&mut wire, requests)?;
    Ok(wire)
}

fn read(mut wire: &[u8]) -> Result<Vec<Request>, Error> {
    let mut reader = RequestReader::new(LANE);
    let mut requests = Vec::new();
    while let Some(request) = reader.next(&mut wire)? {
        requests.push(request);
    }
    Ok(requests)
}

/// Which of these pages are missing, beginning with `first`.
fn absence(region: u16, first: u64, missing: &[bool]) -> Absence {
    let mut map = vec![0; missing.len().div_ceil(8)];
    for (at, _) in missing.iter().enumerate().filter(|(_, missing)| **missing) {
        map[at / 8] |= 1 << (at % 8);
    }
    Absence {
        region,
        first,
        count: missing.len() as u64,
        map: map.into(),
    }
}

fn request() -> impl Strategy<Value = Request> {
    let region = 0..u16::try_from(MAX_REGIONS).unwrap();
    let lacking = (
        region.clone(),
        0_u64..1 << 40,
        prop::collection::vec(any::<bool>(), 1..100),
    );
    prop_oneof![
        (region, 0..PAGE_NUMBER_END).prop_map(|(region, page)| Request::Fault { region, page }),
        any::<u64>().prop_map(|frames| Request::Placed { frames }),
        lacking.prop_map(|(region, first, missing)| {
            Request::Lacking(absence(region, first, &missing))
        }),
        Just(Request::Whole),
    ]
}

proptest! {
    #[test]
    fn what_is_written_is_read(requests in prop::collection::vec(request(), 0..20)) {
        prop_assert_eq!(read(&written(&requests).unwrap()).unwrap(), requests);
    }

    #[test]
    fn a_changed_bit_is_found(requests in prop::collection::vec(request(), 1..5), at: prop::sample::Index, bit in 0..8_u32) {
        let mut wire = written(&requests).unwrap();
        let at = at.index(wire.len());
        wire[at] ^= 1 << bit;
        prop_assert!(read(&wire).is_err());
    }

    #[test]
    fn a_lane_that_ends_in_a_frame_is_no_end(requests in prop::collection::vec(request(), 1..5), cut: prop::sample::Index) {
        let wire = written(&requests).unwrap();
        let cut = cut.index(wire.len());
        match read(&wire[..cut]) {
            Ok(came) => {
                let whole = written(&came).unwrap();
                prop_assert_eq!(whole.len(), cut, "between two frames");
            }
            Err(error) => prop_assert!(matches!(error, Error::Truncated { .. }), "{:?}", error),
        }
    }

    #[test]
    fn runs_are_what_was_missing(missing in prop::collection::vec(any::<bool>(), 1..200), first in 0_u64..1000) {
        let told = absence(0, first, &missing);
        let mut found = vec![false; missing.len()];
        let mut free = 0;
        for DataRun { first: start, count } in told.runs() {
            let start = usize::try_from(start - first).unwrap();
            prop_assert!(count > 0 && start >= free, "in order and apart");
            let end = start + usize::try_from(count).unwrap();
            found[start..end].fill(true);
            free = end + 1;
        }
        prop_assert_eq!(found, missing);
    }
}

#[test]
fn what_breaks_a_limit_is_not_sent() {
    let lacking = |absence| written(&[Request::Lacking(absence)]);
    let good = absence(0, 7, &[true; 12]);
    lacking(good.clone()).unwrap();
    let bad = [
        Absence {
            region: u16::try_from(MAX_REGIONS).unwrap(),
            ..good.clone()
        },
        Absence {
            first: PAGE_NUMBER_END,
            ..good.clone()
        },
        Absence {
            first: PAGE_NUMBER_END - 11,
            ..good.clone()
        },
        Absence {
            count: 0,
            map: Bytes::new(),
            ..good.clone()
        },
        Absence {
            count: 17,
            ..good.clone()
        },
        Absence {
            map: Bytes::from_static(&[0xff, 0x1f]),
            ..good.clone()
        },
        Absence {
            count: MAX_MAPPED_PAGES + 1,
            map: vec![0; usize::try_from(MAX_MAPPED_PAGES / 8).unwrap() + 1].into(),
            ..good
        },
    ];
    for absence in bad {
        let error = lacking(absence.clone()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::BadField {
                    kind: Kind::Lacking,
                    ..
                }
            ),
            "{absence:?}: {error:?}"
        );
    }
    for (region, page) in [(u16::MAX, 0), (0, PAGE_NUMBER_END)] {
        let error = written(&[Request::Fault { region, page }]).unwrap_err();
        assert!(
            matches!(
                error,
                Error::BadField {
                    kind: Kind::Fault,
                    ..
                }
            ),
            "{error:?}"
        );
    }
}

#[test]
fn another_lane_or_life_is_refused() {
    let wire = written(&[Request::Whole, Request::Whole]).unwrap();
    let strangers = [
        LaneId {
            index: LaneIndex(2),
            ..LANE
        },
        LaneId {
            generation: Generation(0),
            ..LANE
        },
    ];
    for lane in strangers {
        RequestReader::new(lane).next(&mut &wire[..]).unwrap_err();
    }
    let second = &wire[wire.len() / 2..];
    let error = RequestReader::new(LANE).next(&mut &second[..]).unwrap_err();
    assert!(matches!(error, Error::OutOfSequence { .. }), "{error:?}");
}
