//! Moves of the toy guest within one host, where the target takes pages from the source's RAM.

use std::num::NonZeroU16;
use std::time::Duration;

use ferry_engine::core::message::Outcome;
use ferry_engine::core::outcome::in_full;
use ferry_engine::core::source::LanePlan;
use ferry_engine::job::SourceBuilder;
use ferry_engine::{Compression, WithinHost};
use ferry_testbed::toy::{Call, Ended, Fault, Model, Pair};
use tokio::time::timeout;

/// Longer than any test here may take.
const BOUND: Duration = Duration::from_secs(30);

type Outcomes = Result<(), Box<dyn std::error::Error>>;

/// A move over TCP of a guest whose VMM lends its RAM, set up by `set_up`.
async fn moved(pair: &Pair, set_up: impl FnOnce(SourceBuilder) -> SourceBuilder) -> Ended {
    pair.source.lend_ram();
    let (target, address) = pair.listening().await.unwrap();
    let target = target.start().await.unwrap();
    let job = set_up(pair.sending_to(address)).start().await.unwrap();
    let both = async { tokio::join!(job.finish(), target.finish()) };
    let (source, target) = timeout(BOUND, both).await.expect("every wait is bounded");
    Ended { source, target }
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_are_taken_and_not_sent() -> Outcomes {
    for lanes in [1, 3] {
        let pair = Pair::new(&Model::default())?;
        let lanes = NonZeroU16::new(lanes).unwrap();
        let ended = moved(&pair, |source| {
            source
                .with_lanes(LanePlan::Fixed(lanes))
                .with_compression(Compression::Lz4)
        })
        .await;
        pair.check(&ended);
        let report = &ended.source.report;
        assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
        let told: u64 = report.rounds.iter().map(|round| round.pages).sum();
        assert!(told > 0 && report.shared_pages == told, "{report:?}");
        assert_eq!(report.encoding.data_bytes, 0, "{report:?}");
        assert_eq!(pair.source.faults().count(Call::Read), 0);
        assert_eq!(pair.target.faults().count(Call::Receive), 0);
        assert!(pair.target.faults().count(Call::Fetch) > 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_travel_when_they_shall_or_must() -> Outcomes {
    for (within_host, lends) in [(WithinHost::Never, true), (WithinHost::Auto, false)] {
        let pair = Pair::new(&Model::default())?;
        let ended = if lends {
            moved(&pair, |source| source.with_within_host(within_host)).await
        } else {
            let (target, address) = pair.listening().await?;
            let target = target.start().await?;
            let job = pair.sending_to(address).start().await?;
            let (source, target) = tokio::join!(job.finish(), target.finish());
            Ended { source, target }
        };
        pair.check(&ended);
        assert!(matches!(ended.source.outcome, Outcome::Moved), "{ended:?}");
        assert_eq!(ended.source.report.shared_pages, 0);
        assert_eq!(pair.target.faults().count(Call::Fetch), 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_whose_pages_cannot_be_taken_is_kept() -> Outcomes {
    for fault in [Fault::Io, Fault::Panic] {
        for nth in [1, 3] {
            let pair = Pair::new(&Model::default())?;
            pair.target.faults().plan(Call::Fetch, nth, fault);
            let ended = moved(&pair, |source| source).await;
            pair.check(&ended);
            let Outcome::Kept { reason, .. } = &ended.target.outcome else {
                panic!("{ended:?}");
            };
            assert!(in_full(reason).contains("moving pages"), "{ended:?}");
        }
    }
    Ok(())
}
