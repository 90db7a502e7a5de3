//! Where QEMU maps its memory back ends, read from two human monitor commands.
//!
//! QMP tells the id and size of a back end but not where it lies in QEMU's address space, and the
//! paths in `/proc/PID/maps` do not identify one: `mem-path` may be a folder, a relative path, a link
//! or a name in another mount namespace, names are reused, and two back ends may share a file. The
//! address does. `x-query-ramblock` shows it from some version on, 7.2 not yet; `info mtree -f` with
//! `gpa2hva` gives it in every version alike, and at the same time tells which back ends are guest
//! RAM at all: those that the guest can reach.

/// A piece of a RAM block in the guest's physical address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The memory region, named after its back end.
    pub(super) name: String,
    /// Where the guest sees it.
    pub(super) guest_address: u64,
    /// How far into the memory region this piece begins, in bytes.
    pub(super) offset: u64,
}

/// The back end's id in the name of a memory region or RAM block: machine types before 4.0 use the
/// whole path.
pub(super) fn backend_id(name: &str) -> &str {
    name.strip_prefix("/objects/").unwrap_or(name)
}

/// The first piece of every writable memory region in the address space `memory`, from the text of
/// `info mtree -f`.
pub(super) fn first_pieces(text: &str) -> Vec<Placed> {
    let mut pieces: Vec<Placed> = Vec::new();
    for piece in memory_view(text).filter_map(piece) {
        if !pieces.iter().any(|known| known.name == piece.name) {
            pieces.push(piece);
        }
    }
    pieces
}

/// The address in QEMU, and the memory region it belongs to, from the text of `gpa2hva`.
pub(super) fn host_address(text: &str) -> Option<(&str, u64)> {
    let (name, address) = text.split_once('(')?.1.split_once(") is 0x")?;
    Some((name, hex(address.trim_end())?))
}

/// The names of the RAM blocks that are part of the machine, from the text of `info ramblock`.
///
/// A back end that nothing uses has a block without a name.
pub(super) fn block_names(text: &str) -> Vec<&str> {
    text.lines()
        .skip(1)
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let first = words.next()?;
            // The second column is the page size: a number and a unit.
            words
                .next()?
                .bytes()
                .all(|b| b.is_ascii_digit())
                .then_some(first)
        })
        .collect()
}

/// The lines of the flat view that is the address space `memory`: what the guest's processors see.
fn memory_view(text: &str) -> impl Iterator<Item = &str> {
    text.split("FlatView #")
        .find(|view| {
            view.lines()
                .any(|line| line.trim_start().starts_with("AS \"memory\""))
        })
        .unwrap_or_default()
        .lines()
}

/// Parses `0000000000100000-0000000003ffffff (prio 0, ram): ram0 @0000000000100000`.
fn piece(line: &str) -> Option<Placed> {
    let (range, rest) = line.trim_start().split_once(' ')?;
    let guest_address = hex(range.split_once('-')?.0)?;
    let (kind, rest) = rest.split_once("): ")?;
    if !kind.ends_with(", ram") {
        return None;
    }
    let mut words = rest.split_whitespace();
    let name = words.next()?.to_owned();
    let offset = match words.next().and_then(|word| word.strip_prefix('@')) {
        Some(offset) => hex(offset)?,
        None => 0,
    };
    Some(Placed {
        name,
        guest_address,
        offset,
    })
}

fn hex(digits: &str) -> Option<u64> {
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIEW: &str = r#"FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, ram): decoy

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-000000000009ffff (prio 0, ram): /objects/m0 KVM
  00000000000a0000-00000000000bffff (prio 1, i/o): vga-lowmem
  00000000000c0000-00000000000dffff (prio 1, rom): pc.rom
  0000000000100000-0000000003ffffff (prio 0, ram): /objects/m0 @0000000000100000 KVM
  0000000004000000-0000000007ffffff (prio 0, ram): m1 @0000000000200000
"#;

    #[test]
    fn finds_the_first_piece_of_each_region() {
        let placed = |name: &str, guest_address, offset| Placed {
            name: name.into(),
            guest_address,
            offset,
        };
        assert_eq!(
            first_pieces(VIEW),
            [
                placed("/objects/m0", 0, 0),
                placed("m1", 0x400_0000, 0x20_0000)
            ]
        );
        assert_eq!(first_pieces("nothing of the kind"), []);
    }

    #[test]
    fn reads_a_host_address() {
        let text = "Host virtual address for 0x0 (pc.ram) is 0x7fe11fe00000\r\n";
        assert_eq!(host_address(text), Some(("pc.ram", 0x7fe1_1fe0_0000)));
        assert_eq!(host_address("No memory is mapped at address 0x0\r\n"), None);
    }

    #[test]
    fn names_only_blocks_in_use() {
        let text = "              Block Name    PSize              Offset\n\
                    \x20                   ram0    4 KiB  0x0000000000000000\n\
                    \x20                           4 KiB  0x0000000014000000\n\
                    \x20  0000:00:01.0/vga.vram    4 KiB  0x0000000018080000\n\
                    \x20                     d0    2 MiB  0x0000000010000000\n";
        assert_eq!(block_names(text), ["ram0", "0000:00:01.0/vga.vram", "d0"]);
    }

    #[test]
    fn a_region_is_named_by_its_back_end() {
        assert_eq!(backend_id("/objects/ram0"), "ram0");
        assert_eq!(backend_id("ram0"), "ram0");
    }
}
