//! QEMU's migration capabilities and parameters: read, set fully, put back exactly.
//!
//! Whatever the operator had set for migrations of QEMU's own, one that is left on (`multifd`,
//! `postcopy-ram`, a TLS credential) would change the stream or be refused. So every capability is
//! set, not only those that we need.

use ferry_qmp::commands::{
    MigrateSetCapabilities, MigrateSetParameters, MigrationCapability, MigrationParameters,
    QueryMigrateCapabilities, QueryMigrateParameters,
};
use serde_json::json;

use super::monitor::Monitor;
use crate::vmm::VmmError;

/// Which end of a migration a QEMU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It has the guest.
    Source,
    /// It waits for one.
    Target,
}

/// The downtime limit for QEMU's own part, in milliseconds: small, so that QEMU does not begin to
/// switch over with much video memory still to send; not zero, or a guest that draws all the time
/// would never let it begin.
const DOWNTIME_LIMIT_MS: u64 = 10;

/// The most that QEMU takes for a bandwidth in bytes per second: no limit in practice.
const MAX_BANDWIDTH: u64 = i64::MAX as u64;

impl Side {
    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Source => &["events", "x-ignore-shared", "pause-before-switchover"],
            // Without late-block-activate QEMU 7.2 takes the images' write locks at the load, and
            // the source could not resume.
            Self::Target => &["events", "x-ignore-shared", "late-block-activate"],
        }
    }
}

/// What has to change at a QEMU, and how it was.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Settings {
    /// The capabilities that are to be changed, as they were.
    capabilities: Vec<MigrationCapability>,
    /// What is to be set.
    wanted: MigrationParameters,
    /// How that was.
    former: MigrationParameters,
}

impl Settings {
    /// Reads how a QEMU is set. Changes nothing.
    pub(super) async fn read(monitor: &Monitor, side: Side) -> Result<Self, VmmError> {
        let (capabilities, parameters) = tokio::try_join!(
            monitor.ask(QueryMigrateCapabilities),
            monitor.ask(QueryMigrateParameters),
        )?;
        Self::differences(side, capabilities, &parameters)
    }

    fn differences(
        side: Side,
        found: Vec<MigrationCapability>,
        parameters: &MigrationParameters,
    ) -> Result<Self, VmmError> {
        let wanted = side.capabilities();
        let known = |name: &str| found.iter().any(|found| found.capability == name);
        if let Some(missing) = wanted.iter().find(|name| !known(name)) {
            return Err(VmmError::Unfit {
                what: format!("this QEMU has no migration capability {missing}: it is too old"),
            });
        }
        let mut settings = Self {
            capabilities: found,
            ..Self::default()
        };
        settings
            .capabilities
            .retain(|found| found.state != wanted.contains(&&*found.capability));
        settings.change_parameters(side, parameters);
        Ok(settings)
    }

    fn change_parameters(&mut self, side: Side, found: &MigrationParameters) {
        // A QEMU that lacks a parameter is not told about it.
        for (name, value) in [("tls-creds", json!("")), ("mode", json!("normal"))] {
            if let Some(former) = found.rest.get(name).filter(|former| **former != value) {
                self.former.rest.insert(name.to_owned(), former.clone());
                self.wanted.rest.insert(name.to_owned(), value);
            }
        }
        if side == Side::Source {
            self.former.max_bandwidth_bytes_per_s = found.max_bandwidth_bytes_per_s;
            self.wanted.max_bandwidth_bytes_per_s = Some(MAX_BANDWIDTH);
            self.former.downtime_limit_ms = found.downtime_limit_ms;
            self.wanted.downtime_limit_ms = Some(DOWNTIME_LIMIT_MS);
        }
    }

    /// Sets what is needed.
    pub(super) async fn apply(&self, monitor: &Monitor) -> Result<(), VmmError> {
        let mut capabilities = self.capabilities.clone();
        for capability in &mut capabilities {
            capability.state = !capability.state;
        }
        set(monitor, capabilities, &self.wanted).await
    }

    /// Puts back what was found. May be done again, also after an `apply` that failed half-way.
    pub(super) async fn restore(&self, monitor: &Monitor) -> Result<(), VmmError> {
        set(monitor, self.capabilities.clone(), &self.former).await
    }
}

async fn set(
    monitor: &Monitor,
    capabilities: Vec<MigrationCapability>,
    parameters: &MigrationParameters,
) -> Result<(), VmmError> {
    if !capabilities.is_empty() {
        monitor.ask(MigrateSetCapabilities { capabilities }).await?;
    }
    if *parameters != MigrationParameters::default() {
        let parameters = parameters.clone();
        monitor.ask(MigrateSetParameters { parameters }).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capability(name: &str, state: bool) -> MigrationCapability {
        MigrationCapability {
            capability: name.to_owned(),
            state,
        }
    }

    fn capabilities(on: &[&str]) -> Vec<MigrationCapability> {
        [
            "events",
            "x-ignore-shared",
            "pause-before-switchover",
            "late-block-activate",
            "multifd",
        ]
        .map(|name| capability(name, on.contains(&name)))
        .into()
    }

    fn parameters(credentials: &str) -> MigrationParameters {
        let mut parameters = MigrationParameters {
            max_bandwidth_bytes_per_s: Some(1 << 27),
            downtime_limit_ms: Some(300),
            ..Default::default()
        };
        let rest = &mut parameters.rest;
        rest.insert("tls-creds".into(), json!(credentials));
        rest.insert("multifd-channels".into(), json!(2));
        parameters
    }

    #[test]
    fn changes_only_what_differs() {
        let found = capabilities(&["events", "multifd"]);
        let settings = Settings::differences(Side::Source, found, &parameters("tls0")).unwrap();
        assert_eq!(
            settings.capabilities,
            [
                capability("x-ignore-shared", false),
                capability("pause-before-switchover", false),
                capability("multifd", true),
            ]
        );
        let mut former = parameters("tls0");
        former.rest.remove("multifd-channels");
        assert_eq!(settings.former, former);
        assert_eq!(settings.wanted.rest["tls-creds"], "");
    }

    #[test]
    fn changes_nothing_that_is_right() {
        let found = capabilities(Side::Target.capabilities());
        let settings = Settings::differences(Side::Target, found, &parameters("")).unwrap();
        assert_eq!(settings, Settings::default());
    }

    #[test]
    fn names_a_missing_capability() {
        let error = Settings::differences(Side::Source, Vec::new(), &parameters("")).unwrap_err();
        assert!(error.to_string().contains("events"), "{error}");
    }
}
