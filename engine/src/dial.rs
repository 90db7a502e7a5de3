//! The connections that a source opens besides its control lane: page lanes, and questions.

use std::io;

use ferry_stream::lane::ControlLane;
use ferry_stream::link::{Connector, Lane};
use ferry_stream::message::{
    Features, Hello, LaneId, Message, Purpose, SessionId, Verdict, Versions,
};
use tokio::time::timeout;

use crate::control::BoxedConnection;
use crate::core::outcome::in_full;
use crate::near;
use crate::near::lender::Lender;

/// Opens a page lane and greets on it: through the back door of a target on this host, or else as to
/// any other.
pub(crate) async fn open_lane(
    connector: &dyn Connector,
    lender: Option<&Lender>,
    session: SessionId,
    id: LaneId,
) -> Result<Box<dyn Lane>, ferry_stream::Error> {
    if let Some(lender) = lender {
        let passed = async { greet_lane(lender.lane().await, session, Purpose::Lane(id)).await };
        // Whoever hangs there leaves time for the other way.
        let greeted = timeout(near::LIMIT, passed).await;
        match greeted.unwrap_or_else(|elapsed| Err(io::Error::from(elapsed).into())) {
            Ok(lane) => return Ok(lane),
            Err(error) => tracing::debug!(error = in_full(&error), %id, "no lane within the host"),
        }
    }
    greet_lane(connector.connect().await, session, Purpose::Lane(id)).await
}

/// Opens a fetch lane and greets on it.
pub(crate) async fn open_fetch_lane(
    connector: &dyn Connector,
    session: SessionId,
    id: LaneId,
) -> Result<Box<dyn Lane>, ferry_stream::Error> {
    greet_lane(connector.connect().await, session, Purpose::Fetch(id)).await
}

async fn greet_lane(
    connection: io::Result<BoxedConnection>,
    session: SessionId,
    purpose: Purpose,
) -> Result<Box<dyn Lane>, ferry_stream::Error> {
    let mut lane = ControlLane::new(connection?);
    greet(&mut lane, session, purpose).await?;
    Ok(lane.into_inner()?.into_lane()?)
}

/// Says hello and waits to be welcomed.
async fn greet(
    lane: &mut ControlLane<BoxedConnection>,
    session: SessionId,
    purpose: Purpose,
) -> Result<(), ferry_stream::Error> {
    let (versions, features) = (Versions::OURS, Features::NONE);
    let hello = Hello {
        versions,
        features,
        session,
        purpose,
        offer: None,
    };
    lane.writer.send(&Message::Hello(hello)).await?;
    match lane.reader.next().await? {
        Some(Message::Welcome(_)) => Ok(()),
        Some(Message::Abort { text, .. }) => Err(refused(&text).into()),
        Some(message) => Err(refused(&format!("it answered with {}", message.name())).into()),
        None => Err(refused("it closed the connection").into()),
    }
}

fn refused(text: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionRefused,
        format!("the target refused: {text}"),
    )
}

/// Asks the target who owns the guest, over a connection of its own.
pub(crate) async fn inquire(
    connector: &dyn Connector,
    session: SessionId,
) -> Result<Verdict, ferry_stream::Error> {
    let mut lane = ControlLane::new(connector.connect().await?);
    greet(&mut lane, session, Purpose::Inquire).await?;
    lane.writer.send(&Message::Inquire).await?;
    loop {
        match lane.reader.next().await? {
            Some(Message::Answer(verdict)) => return Ok(verdict),
            Some(Message::Ping) => {}
            Some(message) => return Err(refused(&format!("it sent {}", message.name())).into()),
            None => return Err(refused("it closed the connection").into()),
        }
    }
}
