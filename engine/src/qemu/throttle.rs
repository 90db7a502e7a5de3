//! Slowing a QEMU's vCPUs.
//!
//! QEMU's own throttle belongs to its own migration, and its dirty limit wants a KVM dirty ring. So the
//! vCPU threads get less time from the kernel; that holds for every accelerator, and for the one thread
//! that runs all vCPUs of a TCG guest with `thread=single`.

use std::collections::BTreeSet;
use std::sync::Arc;

use ferry_qmp::commands::QueryCpusFast;
use nix::unistd::Pid;

use super::attach::{Inner, Qemu, own_number};
use super::checks::{Problem, ProblemCode};
use crate::linux::{CpuQuota, Error, Process};
use crate::vmm::VmmError;

/// How slow a QEMU's vCPUs are made. Dropped, it leaves nothing behind, also of a QEMU that has ended.
#[derive(Default)]
pub(super) struct Throttle(Option<CpuQuota>);

impl Throttle {
    /// Leaves every vCPU all but `percent` of its time; 0 gives all of it back, at once.
    pub(super) fn set(&mut self, qemu: &Inner, percent: u8) -> Result<(), VmmError> {
        match (percent, &mut self.0) {
            (0, None) => Ok(()),
            (0, Some(quota)) => Ok(quota.lift()?),
            (percent, quota) => {
                // They may have been plugged since.
                let vcpus = qemu.runtime().block_on(vcpu_threads(qemu))?;
                let quota = quota.get_or_insert_with(|| CpuQuota::new(Arc::clone(qemu.process())));
                Ok(quota.limit(&vcpus, percent)?)
            }
        }
    }

    /// Gives all time back, and leaves nothing behind.
    pub(super) fn clear(&mut self) -> Result<(), VmmError> {
        if let Some(quota) = &mut self.0 {
            quota.clear()?;
        }
        self.0 = None;
        Ok(())
    }
}

/// Gives vCPUs back the time that an engine took which was killed.
pub(super) fn clear_leftovers(process: &Arc<Process>) -> Result<(), VmmError> {
    if CpuQuota::clear_leftovers(process)? {
        tracing::warn!("an engine that was killed had left the guest slow: it is not any more");
    }
    Ok(())
}

impl Qemu {
    /// Why this QEMU's guest cannot be slowed, if it cannot. Changes nothing.
    ///
    /// # Errors
    /// Only when QEMU or its process cannot be asked.
    pub async fn throttle_problem(&self) -> Result<Option<Problem>, VmmError> {
        let qemu = self.inner();
        let vcpus = vcpu_threads(qemu).await?;
        match CpuQuota::check(qemu.process(), &vcpus) {
            Ok(()) => Ok(None),
            Err(error @ Error::NoQuota { .. }) => {
                let text = error.to_string();
                let (found, remedy) = text.rsplit_once(": ").unwrap_or((&text, "see above"));
                let remedy = format!("{remedy}, or move it without --auto-converge");
                Ok(Some(Problem::new(ProblemCode::Throttle, found, remedy)))
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// The threads that run vCPUs, by their numbers in our own pid namespace.
async fn vcpu_threads(qemu: &Inner) -> Result<Vec<Pid>, VmmError> {
    let vcpus = qemu.monitor().ask(QueryCpusFast).await?;
    let theirs: BTreeSet<i32> = vcpus.iter().map(|vcpu| vcpu.thread_id).collect();
    let process = qemu.process();
    let mut threads = process.threads()?;
    threads.retain(|thread| {
        let own = own_number(process.pid(), *thread);
        own.is_some_and(|own| theirs.contains(&own))
    });
    Ok(threads)
}
