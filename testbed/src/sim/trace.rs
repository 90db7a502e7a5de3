//! What happened, in a line each, for whoever replays a seed.

use ferry_engine::core::message::{Action, Input, Pages};

/// A fact in a few words.
pub(super) fn fact(input: &Input) -> String {
    match input {
        Input::Collected { found } => format!("Collected: {} pages", found.len()),
        Input::Reclaimed { lane, from } => {
            format!(
                "Reclaimed of {lane}: {} placed, {} found",
                from.placed,
                from.found.len()
            )
        }
        Input::Inventoried(_) => "Inventoried".to_owned(),
        other => short(format!("{other:?}")),
    }
}

/// An order in a few words.
pub(super) fn order(action: &Action) -> String {
    match action {
        Action::Reclaim { lane, frames, .. } => format!("Reclaim {lane} from {frames}"),
        Action::StartTracking { .. } => "StartTracking".to_owned(),
        Action::Collect { .. } => "Collect".to_owned(),
        Action::Scan { rearm, with } => {
            format!("Scan, and {} pages, rearm: {rearm:?}", with.len())
        }
        Action::Copy {
            round,
            pages,
            zeros,
            deltas,
            ..
        } => match pages {
            Pages::Known(pages) => format!(
                "Copy {} pages in {round}, zeros: {zeros:?}, deltas: {deltas:?}",
                pages.len()
            ),
            Pages::Scanned => {
                format!("Copy what is found in {round}, zeros: {zeros:?}, deltas: {deltas:?}")
            }
        },
        other => short(format!("{other:?}")),
    }
}

/// Characters of a line that still tell something.
const LINE: usize = 160;

fn short(line: String) -> String {
    if line.chars().count() <= LINE {
        return line;
    }
    line.chars().take(LINE).chain("…".chars()).collect()
}
