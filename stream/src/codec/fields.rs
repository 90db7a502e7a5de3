//! Reading payloads.

use bytes::{Buf, Bytes, TryGetError};

use super::{NO_LANE, clean};
use crate::error::Error;
use crate::frame::{Generation, Kind};
use crate::limits::{MAX_AHEAD_RUNS, MAX_NAME, MAX_REGIONS, MAX_TEXT};
use crate::message::{
    AbortCode, Absence, DataRun, Features, Hello, LaneId, LaneIndex, Message, Mode, Offer, Purpose,
    RegionInfo, Round, Run, SessionId, Verdict, Versions, Welcome,
};

/// A payload, read from its front.
pub(super) struct Fields {
    kind: Kind,
    rest: Bytes,
}

impl Fields {
    pub(super) fn new(kind: Kind, payload: Bytes) -> Self {
        Self {
            kind,
            rest: payload,
        }
    }

    pub(super) fn message(&mut self) -> Result<Message, Error> {
        Ok(match self.kind {
            Kind::Hello => Message::Hello(self.hello()?),
            Kind::Welcome => Message::Welcome(Welcome {
                version: self.u16()?,
                features: Features(self.u64()?),
                lanes: self.u16()?,
            }),
            Kind::Prepared => Message::Prepared,
            Kind::Paused => Message::Paused,
            Kind::State => Message::State {
                offset: self.u64()?,
                bytes: std::mem::take(&mut self.rest),
            },
            Kind::RoundDone => Message::RoundDone {
                round: Round(self.u32()?),
                pages: self.u64()?,
            },
            Kind::Complete => Message::Complete {
                round: Round(self.u32()?),
                pages: self.u64()?,
                state_bytes: self.u64()?,
                state_crc: self.u32()?,
            },
            Kind::Ready => Message::Ready {
                load_us: self.u32()?,
            },
            Kind::Go => Message::Go {
                run: match self.u8()? {
                    1 => Run::Run,
                    2 => Run::StayPaused,
                    found => return Err(self.bad("the run state", found)),
                },
            },
            Kind::Running => Message::Running {
                resume_us: self.u32()?,
            },
            Kind::Returned => Message::Returned {
                reason: clean(&self.text("the reason", MAX_TEXT)?),
            },
            Kind::Finished => Message::Finished,
            Kind::Ping => Message::Ping,
            Kind::Inquire => Message::Inquire,
            Kind::Answer => Message::Answer(match self.u8()? {
                1 => Verdict::Taken,
                2 => Verdict::Refused,
                3 => Verdict::Returned,
                found => return Err(self.bad("the verdict", found)),
            }),
            Kind::Abort => Message::Abort {
                code: AbortCode::from_number(self.u16()?),
                text: clean(&self.text("the text", MAX_TEXT)?),
            },
            Kind::LaneLost => Message::LaneLost {
                lane: self.lane()?,
                text: clean(&self.text("the text", MAX_TEXT)?),
            },
            Kind::Fence => Message::Fence(self.lane()?),
            Kind::Fenced => Message::Fenced {
                lane: self.lane()?,
                frames: self.u64()?,
                pages: self.u64()?,
            },
            Kind::Mismatch => Message::Mismatch {
                lane: self.lane()?,
                round: Round(self.u32()?),
                region: self.u16()?,
                page: self.u64()?,
            },
            Kind::Ahead => Message::Ahead {
                region: self.u16()?,
                runs: self.data_runs()?,
            },
            Kind::Discard => Message::Discard,
            Kind::Discarded => Message::Discarded,
            Kind::Absent => Message::Absent(self.absence()?),
            Kind::Pages
            | Kind::RoundEnd
            | Kind::Fault
            | Kind::Placed
            | Kind::Lacking
            | Kind::Whole => {
                return Err(Error::MisplacedKind {
                    kind: self.kind,
                    lane: LaneIndex::CONTROL,
                });
            }
        })
    }

    fn hello(&mut self) -> Result<Hello, Error> {
        let versions = Versions {
            lowest: self.u16()?,
            highest: self.u16()?,
        };
        let features = Features(self.u64()?);
        let mut session = SessionId([0; 16]);
        self.rest
            .try_copy_to_slice(&mut session.0)
            .map_err(|error| self.short(&error))?;
        let purpose = self.u8()?;
        let lane = self.lane()?;
        let purpose = match (purpose, lane) {
            (1, NO_LANE) => Purpose::Migrate,
            (2, lane) => Purpose::Lane(lane),
            (3, NO_LANE) => Purpose::Inquire,
            (4, lane) => Purpose::Fetch(lane),
            (1 | 3, lane) => return Err(self.bad("the lane", lane.index.0)),
            (found, _) => return Err(self.bad("the purpose", found)),
        };
        let offer = match purpose {
            Purpose::Migrate => Some(self.offer()?),
            Purpose::Lane(_) | Purpose::Inquire | Purpose::Fetch(_) => None,
        };
        Ok(Hello {
            versions,
            features,
            session,
            purpose,
            offer,
        })
    }

    fn lane(&mut self) -> Result<LaneId, Error> {
        Ok(LaneId {
            index: LaneIndex(self.u16()?),
            generation: Generation(self.u16()?),
        })
    }

    fn offer(&mut self) -> Result<Offer, Error> {
        let mode = match self.u8()? {
            1 => Mode::Live,
            2 => Mode::Paused,
            found => return Err(self.bad("the mode", found)),
        };
        let lanes = self.u16()?;
        let arch = self.text("the architecture", MAX_NAME)?;
        let machine = self.text("the machine type", MAX_NAME)?;
        let vmm = self.text("the VMM's name", MAX_NAME)?;
        let count = self.u16()?;
        if usize::from(count) > MAX_REGIONS {
            return Err(self.bad("the number of regions", count));
        }
        let regions = (0..count)
            .map(|_| self.region())
            .collect::<Result<_, _>>()?;
        Ok(Offer {
            arch,
            machine,
            vmm,
            regions,
            lanes,
            mode,
        })
    }

    fn region(&mut self) -> Result<RegionInfo, Error> {
        Ok(RegionInfo {
            name: self.text("a region's name", MAX_NAME)?,
            bytes: self.u64()?,
            backing_page_bytes: self.u32()?,
        })
    }

    pub(super) fn absence(&mut self) -> Result<Absence, Error> {
        Ok(Absence {
            region: self.u16()?,
            first: self.u64()?,
            count: self.u64()?,
            map: self.rest.split_off(0),
        })
    }

    fn data_runs(&mut self) -> Result<Vec<DataRun>, Error> {
        let count = self.u16()?;
        if usize::from(count) > MAX_AHEAD_RUNS {
            return Err(self.bad("the number of runs", count));
        }
        let run = |_| {
            Ok(DataRun {
                first: self.u64()?,
                count: self.u64()?,
            })
        };
        (0..count).map(run).collect()
    }

    fn text(&mut self, field: &'static str, limit: usize) -> Result<String, Error> {
        let kind = self.kind;
        let length = usize::from(self.u16()?);
        if length > limit {
            return Err(self.bad(field, length as u64));
        }
        if length > self.rest.len() {
            return Err(Error::ShortPayload { kind });
        }
        let bytes = self.rest.split_to(length);
        let text = str::from_utf8(&bytes).map_err(|_| Error::BadText { kind, field })?;
        Ok(text.to_owned())
    }

    fn u8(&mut self) -> Result<u8, Error> {
        self.rest.try_get_u8().map_err(|error| self.short(&error))
    }

    fn u16(&mut self) -> Result<u16, Error> {
        self.rest
            .try_get_u16_le()
            .map_err(|error| self.short(&error))
    }

    fn u32(&mut self) -> Result<u32, Error> {
        self.rest
            .try_get_u32_le()
            .map_err(|error| self.short(&error))
    }

    fn u64(&mut self) -> Result<u64, Error> {
        self.rest
            .try_get_u64_le()
            .map_err(|error| self.short(&error))
    }

    /// An error unless everything was read.
    pub(super) fn finish(&self) -> Result<(), Error> {
        if self.rest.is_empty() {
            return Ok(());
        }
        Err(Error::TrailingBytes {
            kind: self.kind,
            count: self.rest.len(),
        })
    }

    fn bad(&self, field: &'static str, found: impl Into<u64>) -> Error {
        Error::BadField {
            kind: self.kind,
            field,
            found: found.into(),
        }
    }

    fn short(&self, _: &TryGetError) -> Error {
        Error::ShortPayload { kind: self.kind }
    }
}
