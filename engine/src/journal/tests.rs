//! Journals written, torn, spoiled and opened again.

use super::slot::{CRC_AT, MAX_PEER, PEER_AT, RECORD_AT, RECORDS, VERSION_AT};
use super::*;

const SESSION: SessionId = SessionId([7; 16]);

fn open(folder: &Path) -> Result<Journal, JournalError> {
    Journal::open(folder, "qemu-1-2", SESSION, "127.0.0.1:4444")
}

#[test]
fn says_after_reopening_what_was_written_last() {
    let folder = tempfile::tempdir().unwrap();
    for record in RECORDS
        .into_iter()
        .filter(|record| *record != Record::Moved)
    {
        let mut journal = match open(folder.path()) {
            Err(JournalError::InDoubt { path, .. }) => {
                fs::remove_file(path).unwrap();
                open(folder.path()).unwrap()
            }
            journal => journal.unwrap(),
        };
        journal.set_wanted(RunState::Paused);
        journal.write(record).unwrap();
        let path = journal.path().to_owned();
        drop(journal);
        let slots = read(&File::open(path).unwrap()).unwrap();
        let (_, entry) = newest(slots).unwrap();
        let peer = "127.0.0.1:4444".to_owned();
        assert_eq!(
            entry,
            Some(Entry {
                session: SESSION,
                record,
                peer,
                wanted: Some(RunState::Paused),
            })
        );
    }
}

#[test]
fn a_torn_write_leaves_what_was_true_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.write(Record::Migrating).unwrap();
    journal.write(Record::Given).unwrap();
    let path = journal.path().to_owned();
    let at = journal.number % SLOTS * SLOT_BYTES as u64;
    drop(journal);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 100], at + 20).unwrap();
    let journal = open(folder.path()).unwrap();
    assert_eq!(journal.last().unwrap().record, Record::Migrating);
}

/// Overwrites part of every slot that was written.
fn spoil(path: &Path, at: usize, with: &[u8]) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    for slot in 0..SLOTS {
        let mut bytes = [0; SLOT_BYTES];
        let start = slot * SLOT_BYTES as u64;
        file.read_exact_at(&mut bytes, start).unwrap();
        if bytes != [0; SLOT_BYTES] {
            file.write_all_at(with, start + at as u64).unwrap();
        }
    }
}

fn assert_unreadable(folder: &Path) {
    let refusal = open(folder).unwrap_err();
    let JournalError::Unreadable { path } = &refusal else {
        panic!("{refusal}");
    };
    assert!(path.exists(), "it is somebody's to look at");
}

#[test]
fn what_cannot_be_understood_is_not_taken_for_nothing() {
    for records in [&[Record::Given][..], &[Record::Migrating, Record::Given]] {
        for (at, with) in [(0, 0xff), (VERSION_AT, 2), (PEER_AT, 0), (CRC_AT, 0)] {
            let folder = tempfile::tempdir().unwrap();
            let mut journal = open(folder.path()).unwrap();
            for record in records {
                journal.write(*record).unwrap();
            }
            let path = journal.path().to_owned();
            drop(journal);
            spoil(&path, at, &[with, with]);
            assert_unreadable(folder.path());
        }
    }
}

#[test]
fn another_version_in_either_slot_is_not_passed_over() {
    for index in 0..SLOTS {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = open(folder.path()).unwrap();
        journal.write(Record::Migrating).unwrap();
        journal.write(Record::Migrating).unwrap();
        let at = index * SLOT_BYTES as u64 + VERSION_AT as u64;
        journal.file.write_all_at(&[9], at).unwrap();
        drop(journal);
        assert_unreadable(folder.path());
    }
}

#[test]
fn an_unknown_record_is_of_another_version() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.write(Record::Migrating).unwrap();
    let entry = journal.last.clone().unwrap();
    let mut slot = encode(2, &entry);
    slot[RECORD_AT] = 99;
    let crc = crc32fast::hash(&slot[..CRC_AT]);
    slot[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    journal.file.write_all_at(&slot, 0).unwrap();
    drop(journal);
    assert_unreadable(folder.path());
}

#[test]
fn a_journal_of_zeros_says_nothing_and_is_not_left_behind() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("qemu-1-2.journal");
    fs::write(&path, [0; 2 * SLOT_BYTES]).unwrap();
    let journal = open(folder.path()).unwrap();
    assert_eq!(journal.last(), None);
    drop(journal);
    assert!(!path.exists());
}

#[test]
fn refuses_a_guest_that_was_given_away() {
    let folder = tempfile::tempdir().unwrap();
    let mut journal = open(folder.path()).unwrap();
    journal.write(Record::Given).unwrap();
    drop(journal);
    let refusal = open(folder.path()).unwrap_err();
    assert!(
        matches!(
            refusal,
            JournalError::InDoubt {
                session: SESSION,
                ..
            }
        ),
        "{refusal}"
    );
}

#[test]
fn refuses_a_second_engine() {
    let folder = tempfile::tempdir().unwrap();
    let first = open(folder.path()).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(JournalError::Busy { .. })
    ));
    drop(first);
    open(folder.path()).unwrap();
}

#[test]
fn a_long_peer_is_cut_at_a_character() {
    assert_eq!(shorten(&"ü".repeat(200)).len(), MAX_PEER);
    let odd = format!("x{}", "ü".repeat(200));
    assert_eq!(shorten(&odd).len(), MAX_PEER - 1);
}
