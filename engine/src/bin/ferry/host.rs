//! What both commands need of the host: addresses that are allowed, and where journals are.

use std::fs::DirBuilder;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use ferry_engine::Throttling;
use ferry_engine::core::outcome::in_full;
use ferry_engine::job::JournalPlace;
use ferry_engine::linux::Process;
use ferry_engine::qemu::{Options, Problem, Qemu, Side};
use ferry_engine::vmm::VmmError;
use ferry_qmp::Address;
use nix::unistd::Uid;

use crate::args::{Common, StateDir};
use crate::ending::Refusal;

/// The mode of a folder of one user alone.
const PRIVATE: u32 = 0o700;

const ANY_PERMISSION: u32 = 0o777;

/// Resolves `HOST:PORT` to at least one address, and refuses what would leave the host in plain text
/// unasked.
pub(crate) async fn resolve(authority: &str, common: &Common) -> Result<Vec<SocketAddr>, Refusal> {
    let addresses = tokio::net::lookup_host(authority).await;
    let addresses: Vec<_> = addresses
        .map_err(|error| Refusal::because(format!("{authority}: {error}")))?
        .collect();
    let leaves = addresses.iter().find(|address| !address.ip().is_loopback());
    match leaves {
        _ if addresses.is_empty() => Err(Refusal::because(format!("{authority} has no address"))),
        Some(address) if !common.insecure => Err(Refusal::because(format!(
            "{address} is not a loopback address, and guest memory would travel there in plain text: \
             use a tunnel, or say --insecure at both ends if the network is yours alone"
        ))),
        _ => Ok(addresses),
    }
}

/// Attaches, and checks everything that must hold before anything is changed: of a guest that may have to
/// be slowed also that it can be.
pub(crate) async fn attach(
    address: &Address,
    side: Side,
    throttling: Option<Throttling>,
) -> Result<Qemu, Refusal> {
    let qemu = Qemu::attach(address, &Options::default())
        .await
        .map_err(|error| not_attached(address, &error))?;
    let refused = |error: VmmError| Refusal::of(&error);
    let mut problems = qemu.problems(side).await.map_err(refused)?;
    if throttling.is_some() {
        problems.extend(qemu.throttle_problem().await.map_err(refused)?);
    }
    if problems.is_empty() {
        Ok(qemu)
    } else {
        Err(refuse(side, problems))
    }
}

/// Says also what to do where the socket is the trouble.
fn not_attached(address: &Address, error: &VmmError) -> Refusal {
    let mut reason = in_full(error);
    if let Some(remedy) = socket_remedy(address, error) {
        reason = format!("{reason}; {remedy}");
    }
    Refusal::because(reason)
}

fn socket_remedy(address: &Address, error: &VmmError) -> Option<&'static str> {
    const SERVE: &str = "start QEMU with -qmp unix:PATH,server=on,wait=off and give that PATH";
    let VmmError::Failed { source, .. } = error else {
        return None;
    };
    let source = match source.downcast_ref::<ferry_qmp::Error>()? {
        ferry_qmp::Error::Connect { source, .. } => source,
        ferry_qmp::Error::NotQmp { .. } | ferry_qmp::Error::Closed { .. } => return Some(SERVE),
        _ => return None,
    };
    let is_socket = match address {
        Address::Unix(path) => std::fs::metadata(path).map(|found| found.file_type().is_socket()),
        Address::Tcp(_) => Ok(true),
    };
    match (is_socket, source.kind()) {
        (Ok(false), _) => Some("that is no socket: give the path of QEMU's -qmp socket"),
        (_, ErrorKind::ConnectionRefused) => Some("nobody listens there: has its QEMU ended?"),
        (_, ErrorKind::NotFound) => Some(SERVE),
        _ => None,
    }
}

fn refuse(side: Side, problems: Vec<Problem>) -> Refusal {
    let which = match side {
        Side::Source => "this guest cannot be moved",
        Side::Target => "this QEMU cannot take a guest",
    };
    Refusal::with_problems(which.to_owned(), problems)
}

/// The journal of a QEMU: named after its process, which nothing else ever is.
pub(crate) fn journal(process: &Process, common: &Common) -> Result<JournalPlace, Refusal> {
    Ok(JournalPlace {
        folder: state_folder(&common.state)?,
        name: format!("qemu-{}-{}", process.pid(), process.id().start_time_ticks),
    })
}

/// The path of a QMP socket, the same however it is written.
pub(crate) fn socket_path(address: &Address) -> Option<PathBuf> {
    match address {
        Address::Unix(path) => path.canonicalize().ok(),
        Address::Tcp(_) => None,
    }
}

/// Where journals and control sockets are.
pub(crate) fn state_folder(state: &StateDir) -> Result<PathBuf, Refusal> {
    match &state.state_dir {
        Some(folder) => Ok(folder.clone()),
        None => default_folder(),
    }
}

fn default_folder() -> Result<PathBuf, Refusal> {
    let uid = Uid::effective();
    if uid.is_root() {
        return Ok(PathBuf::from("/run/ferry"));
    }
    if let Some(folder) = std::env::var_os("XDG_RUNTIME_DIR") {
        return Ok(PathBuf::from(folder).join("ferry"));
    }
    let folder = std::env::temp_dir().join(format!("ferry-{uid}"));
    own(&folder, uid)?;
    Ok(folder)
}

/// Makes `folder`, where everybody may make one, the user's alone. Whoever else could write there
/// could say whose a guest is.
fn own(folder: &Path, uid: Uid) -> Result<(), Refusal> {
    let failed = |error| Refusal::because(format!("{}: {error}", folder.display()));
    match DirBuilder::new().mode(PRIVATE).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    // Not followed: a link that somebody else made leads anywhere.
    let found = std::fs::symlink_metadata(folder).map_err(failed)?;
    let is_ours = found.uid() == uid.as_raw() && found.mode() & ANY_PERMISSION == PRIVATE;
    if found.is_dir() && is_ours {
        return Ok(());
    }
    Err(Refusal::because(format!(
        "{} is not a folder of yours alone (mode 0700), and journals must not lie where others can \
         write: give a folder with --state-dir",
        folder.display()
    )))
}

#[cfg(test)]
mod tests {
    use std::fs::{Permissions, set_permissions};
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_folder_in_a_shared_place_is_the_users_alone() {
        let place = tempfile::tempdir().unwrap();
        let folder = place.path().join("ferry");
        let uid = Uid::effective();
        own(&folder, uid).unwrap();
        own(&folder, uid).unwrap();
        own(&folder, Uid::from_raw(uid.as_raw() + 1)).unwrap_err();
        set_permissions(&folder, Permissions::from_mode(0o770)).unwrap();
        own(&folder, uid).unwrap_err();
        set_permissions(&folder, Permissions::from_mode(PRIVATE)).unwrap();
        symlink(&folder, place.path().join("link")).unwrap();
        own(&place.path().join("link"), uid).unwrap_err();
    }
}
