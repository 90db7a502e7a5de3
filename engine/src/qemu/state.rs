//! [`DeviceState`] of a QEMU.

use std::io::{Read, Write};
use std::sync::Arc;

use super::attach::Inner;
use super::settings::{Settings, Side};
use crate::vmm::{DeviceState, VmmError};

/// Everything of a QEMU that is not guest RAM, carried by QEMU's own `migrate` between local sockets.
pub struct QemuState {
    qemu: Arc<Inner>,
}

impl QemuState {
    pub(super) fn new(qemu: Arc<Inner>) -> Self {
        Self { qemu }
    }

    /// Sets QEMU up for `side`; what was changed is remembered before it is changed.
    fn set_up(&self, side: Side) -> Result<(), VmmError> {
        self.qemu.with_session(|session| {
            if session.settings.is_some() {
                return Ok(());
            }
            let monitor = self.qemu.monitor();
            self.qemu.runtime().block_on(async {
                let settings = session
                    .settings
                    .insert(Settings::read(monitor, side).await?);
                settings.apply(monitor).await
            })
        })
    }
}

impl DeviceState for QemuState {
    fn open(&mut self, sink: Box<dyn Write + Send>) -> Result<(), VmmError> {
        self.set_up(Side::Source)?;
        self.qemu
            .with_session(|session| session.outgoing.open(&self.qemu, sink))
    }

    fn save(&mut self) -> Result<(), VmmError> {
        let qemu = &self.qemu;
        qemu.with_session(|session| qemu.runtime().block_on(session.outgoing.save(qemu)))
    }

    fn abandon(&mut self) -> Result<(), VmmError> {
        let qemu = &self.qemu;
        qemu.with_session(|session| {
            let saved = qemu.runtime().block_on(session.outgoing.abandon(qemu))?;
            session.announce |= saved;
            Ok(())
        })
    }

    fn prepare(&mut self) -> Result<(), VmmError> {
        self.set_up(Side::Target)?;
        let qemu = &self.qemu;
        qemu.with_session(|session| qemu.runtime().block_on(session.incoming.prepare(qemu)))
    }

    fn load(&mut self, from: &mut dyn Read) -> Result<(), VmmError> {
        let qemu = &self.qemu;
        qemu.with_session(|session| session.incoming.load(qemu, from))
    }
}
