//! What stands in a page: a function of its index and its generation, so that nothing but the
//! generation needs to be remembered to know every byte.

/// The kind of bytes that pages are filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Does not compress.
    Random,
    /// Words of a small vocabulary: compresses about as text does.
    Text,
    /// Does not compress, and changes by a few words from one generation to the next.
    Counters,
}

/// Words that carry the page's own index and generation, in front of the rest.
const HEADER_WORDS: usize = 2;

const VOCABULARY: usize = 256;

/// From one word of a page of counters that changes to the next.
const COUNTER_STRIDE: usize = 128;

/// Writes pages and knows what they must hold.
#[derive(Clone)]
pub(crate) struct Writer {
    content: Content,
    seed: u64,
    vocabulary: Box<[u64; VOCABULARY]>,
}

/// What a page that is not as expected holds instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Exactly what an earlier or later generation wrote.
    Stale {
        /// The generation found.
        generation: u64,
    },
    /// Exactly what belongs into another page.
    Misplaced {
        /// The page to which it belongs.
        index: u64,
    },
    /// Nothing but zeros.
    Zero,
    /// Anything else.
    Torn,
}

impl Writer {
    /// A writer whose pages differ from those of every other seed.
    pub(crate) fn new(content: Content, seed: u64) -> Self {
        let mut state = Stream::new(1, 1, 1);
        let vocabulary = Box::new(std::array::from_fn(|_| word(state.next())));
        Self {
            content,
            seed,
            vocabulary,
        }
    }

    /// Fills `page` with generation `generation` of page `index`.
    pub(crate) fn fill(&self, page: &mut [u64], index: u64, generation: u64) {
        let mut stream = Stream::new(self.seed, index, generation);
        page[0] = index;
        page[1] = generation;
        match self.content {
            Content::Random => {
                for word in &mut page[HEADER_WORDS..] {
                    *word = stream.next();
                }
            }
            Content::Text => {
                for word in &mut page[HEADER_WORDS..] {
                    *word = self.vocabulary[stream.index()];
                }
            }
            Content::Counters => {
                let mut same = Stream::new(self.seed, index, 0);
                for (at, word) in page[HEADER_WORDS..].iter_mut().enumerate() {
                    *word = counted(&mut same, &mut stream, at);
                }
            }
        }
    }

    /// Whether `page` holds exactly generation `generation` of page `index`.
    pub(crate) fn holds(&self, page: &[u64], index: u64, generation: u64) -> bool {
        let mut stream = Stream::new(self.seed, index, generation);
        let rest = &page[HEADER_WORDS..];
        let mut wrong = (page[0] ^ index) | (page[1] ^ generation);
        match self.content {
            Content::Random => {
                for word in rest {
                    wrong |= word ^ stream.next();
                }
            }
            Content::Text => {
                for word in rest {
                    wrong |= word ^ self.vocabulary[stream.index()];
                }
            }
            Content::Counters => {
                let mut same = Stream::new(self.seed, index, 0);
                for (at, word) in rest.iter().enumerate() {
                    wrong |= word ^ counted(&mut same, &mut stream, at);
                }
            }
        }
        wrong == 0
    }

    /// Says what a bad page holds.
    pub(crate) fn diagnose(&self, page: &[u64], index: u64) -> Fault {
        let [found, generation] = [page[0], page[1]];
        if page.iter().all(|&word| word == 0) {
            Fault::Zero
        } else if !self.holds(page, found, generation) {
            Fault::Torn
        } else if found == index {
            Fault::Stale { generation }
        } else {
            Fault::Misplaced { index: found }
        }
    }
}

/// A word of a page of counters: what it always holds, or what belongs to the generation.
fn counted(same: &mut Stream, generation: &mut Stream, at: usize) -> u64 {
    let word = same.next();
    if at.is_multiple_of(COUNTER_STRIDE) {
        generation.next()
    } else {
        word
    }
}

/// A word of four to seven letters, padded with spaces to eight bytes.
fn word(random: u64) -> u64 {
    let letters = 4 + (random >> 60) as usize % 4;
    let mut bytes = [b' '; size_of::<u64>()];
    for (at, byte) in bytes[..letters].iter_mut().enumerate() {
        *byte = b'a' + (random >> (5 * at)) as u8 % 26;
    }
    u64::from_le_bytes(bytes)
}

/// Xorshift: two guest instructions a step matter more here than the quality of the randomness.
#[derive(Clone, Debug)]
pub(crate) struct Stream(u64);

impl Stream {
    /// A stream of its own for every triple.
    pub(crate) fn new(seed: u64, index: u64, generation: u64) -> Self {
        let mixed = mix(mix(mix(seed) ^ index) ^ generation);
        Self(mixed | 1)
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn index(&mut self) -> usize {
        (self.next() >> 32) as usize % VOCABULARY
    }
}

/// The finaliser of `SplitMix64`: every input bit reaches every output bit.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_WORDS;

    fn page(writer: &Writer, index: u64, generation: u64) -> Box<[u64]> {
        let mut page = vec![0; PAGE_WORDS].into_boxed_slice();
        writer.fill(&mut page, index, generation);
        page
    }

    #[test]
    fn every_changed_word_is_seen() {
        for content in [Content::Random, Content::Text, Content::Counters] {
            let writer = Writer::new(content, 7);
            let good = page(&writer, 5, 3);
            assert!(writer.holds(&good, 5, 3));
            for at in 0..PAGE_WORDS {
                let mut bad = good.clone();
                bad[at] ^= 1 << (at % 64);
                assert!(!writer.holds(&bad, 5, 3), "{content:?}, word {at}");
            }
        }
    }

    #[test]
    fn tells_what_a_bad_page_holds() {
        let writer = Writer::new(Content::Random, 7);
        let mut torn = page(&writer, 5, 3);
        torn[PAGE_WORDS / 2..].copy_from_slice(&page(&writer, 5, 2)[PAGE_WORDS / 2..]);
        assert_eq!(writer.diagnose(&torn, 5), Fault::Torn);
        assert_eq!(writer.diagnose(&vec![0; PAGE_WORDS], 5), Fault::Zero);
        let stale = page(&writer, 5, 2);
        assert_eq!(writer.diagnose(&stale, 5), Fault::Stale { generation: 2 });
        assert_eq!(writer.diagnose(&stale, 6), Fault::Misplaced { index: 5 });
    }
}
