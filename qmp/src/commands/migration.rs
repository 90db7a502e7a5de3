//! QEMU's own migration, which carries the device state.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Command, Done, plain_commands};
use crate::event::MigrationStatus;

plain_commands! {
    /// How the migration goes, or what is in its way.
    QueryMigrate = "query-migrate" -> MigrationInfo;
    /// Cancels the migration out. Answered at once; `MIGRATION` tells when it is done.
    MigrateCancel = "migrate_cancel" -> Done;
    /// The capabilities, set or not.
    QueryMigrateCapabilities = "query-migrate-capabilities" -> Vec<MigrationCapability>;
    /// The parameters.
    QueryMigrateParameters = "query-migrate-parameters" -> MigrationParameters;
}

/// How a migration goes.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MigrationInfo {
    /// The state; none when there was no migration.
    pub status: Option<MigrationStatus>,
    /// What became of RAM.
    pub ram: Option<MigrationRam>,
    /// Why it failed.
    pub error_desc: Option<String>,
    /// Why there can be none: a device each, in QEMU's words.
    #[serde(default)]
    pub blocked_reasons: Vec<String>,
    /// From the start up to now, or to the end.
    #[serde(rename = "total-time")]
    pub total_time_ms: Option<u64>,
    /// From the pause to the end.
    #[serde(rename = "downtime")]
    pub downtime_ms: Option<u64>,
}

/// What became of RAM.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct MigrationRam {
    /// Sent, in bytes.
    pub transferred: u64,
    /// Still to be sent, in bytes.
    pub remaining: u64,
    /// All of it, in bytes.
    pub total: u64,
}

/// A capability of the migration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationCapability {
    /// Its name: `events`.
    pub capability: String,
    /// Whether it is set.
    pub state: bool,
}

/// Sets capabilities; those not named stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateSetCapabilities {
    /// Which, and to what.
    pub capabilities: Vec<MigrationCapability>,
}

impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Reply = Done;
}

/// Parameters of the migration. A command sets those that are there; those of a reply are all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationParameters {
    /// Bandwidth in bytes a second; 0 for no limit.
    #[serde(rename = "max-bandwidth", skip_serializing_if = "Option::is_none")]
    pub max_bandwidth_bytes_per_s: Option<u64>,
    /// Longest blackout that QEMU's own judgement aims at.
    #[serde(rename = "downtime-limit", skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// The rest, by QEMU's names.
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

/// Sets parameters.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct MigrateSetParameters {
    /// Those that are there are set, the others stay.
    pub parameters: MigrationParameters,
}

impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = Done;
}

/// Starts a migration out. Answered when it has begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Migrate {
    /// Where to: `unix:/path`.
    pub uri: String,
}

impl Command for Migrate {
    const NAME: &'static str = "migrate";
    type Reply = Done;
}

/// Lets a QEMU that was started with `-incoming defer` listen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateIncoming {
    /// Where: `unix:/path`.
    pub uri: String,
    /// Whether QEMU ends when the load fails (it does unless told). Known since 9.1: none leaves it
    /// out.
    #[serde(rename = "exit-on-error", skip_serializing_if = "Option::is_none")]
    pub exit_on_error: Option<bool>,
}

impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Reply = Done;
}

/// Goes on from a state that the migration waits in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MigrateContinue {
    /// The state: [`MigrationStatus::PreSwitchover`].
    pub state: MigrationStatus,
}

impl Command for MigrateContinue {
    const NAME: &'static str = "migrate-continue";
    type Reply = Done;
}

/// Announces the guest's network addresses, `rounds` times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct AnnounceSelf {
    /// Before the second announcement.
    #[serde(rename = "initial")]
    pub initial_ms: u64,
    /// Longest time between two.
    #[serde(rename = "max")]
    pub max_ms: u64,
    /// How often.
    pub rounds: u64,
    /// By how much the time between two grows.
    #[serde(rename = "step")]
    pub step_ms: u64,
}

impl Default for AnnounceSelf {
    /// As QEMU does by itself after a migration.
    fn default() -> Self {
        Self {
            initial_ms: 50,
            max_ms: 550,
            rounds: 5,
            step_ms: 100,
        }
    }
}

impl Command for AnnounceSelf {
    const NAME: &'static str = "announce-self";
    type Reply = Done;
}
