//! What the kernel's command line asks for: `ferry.NAME=VALUE`.

use crate::content::Content;

/// In which order pages are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// All pages alike.
    Uniform,
    /// 90 % of the writes go to 5 % of the pages.
    Hot,
    /// One after the other.
    Sequential,
}

/// Whether pages that are not being rewritten are verified all the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// Yes; the guest never sleeps.
    On,
    /// No; the guest sleeps for tens of microseconds when no write is due.
    Off,
}

/// Everything that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// MiB to fill.
    pub(crate) mib: usize,
    /// Pages to rewrite each second.
    pub(crate) rate: u64,
    /// Which.
    pub(crate) pattern: Pattern,
    /// With what.
    pub(crate) content: Content,
    /// Verify the rest.
    pub(crate) sweep: Sweep,
    /// Worker threads.
    pub(crate) workers: usize,
    /// Write and verify `/dev/vda`.
    pub(crate) disk: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            mib: 64,
            rate: 0,
            pattern: Pattern::Uniform,
            content: Content::Random,
            sweep: Sweep::On,
            workers: 1,
            disk: false,
        }
    }
}

impl Config {
    /// Reads the command line; a word that starts with `ferry.` and makes no sense is an error.
    pub(crate) fn parse(line: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for word in line.split_whitespace() {
            if let Some(setting) = word.strip_prefix("ferry.") {
                config
                    .apply(setting)
                    .ok_or_else(|| format!("what is {word:?}?"))?;
            }
        }
        Ok(config)
    }

    fn apply(&mut self, setting: &str) -> Option<()> {
        let (name, value) = setting.split_once('=')?;
        match name {
            "mib" => self.mib = value.parse().ok().filter(|&mib| mib > 0)?,
            "rate" => self.rate = value.parse().ok()?,
            "workers" => self.workers = value.parse().ok().filter(|&count| count > 0)?,
            "disk" => self.disk = switch(value)?,
            "sweep" => {
                self.sweep = if switch(value)? {
                    Sweep::On
                } else {
                    Sweep::Off
                }
            }
            "pattern" => {
                self.pattern = match value {
                    "uniform" => Pattern::Uniform,
                    "hot" => Pattern::Hot,
                    "seq" => Pattern::Sequential,
                    _ => return None,
                }
            }
            "content" => {
                self.content = match value {
                    "random" => Content::Random,
                    "text" => Content::Text,
                    "counters" => Content::Counters,
                    _ => return None,
                }
            }
            _ => return None,
        }
        Some(())
    }
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_words_alone() {
        let config = Config::parse("quiet ferry.mib=7 root=x ferry.pattern=hot ferry.disk=1");
        let expected = Config {
            mib: 7,
            pattern: Pattern::Hot,
            disk: true,
            ..Config::default()
        };
        assert_eq!(config, Ok(expected));
        for bad in ["ferry.mib=0", "ferry.rate=x", "ferry.nonsense=1", "ferry."] {
            assert!(Config::parse(bad).is_err(), "{bad}");
        }
    }
}
