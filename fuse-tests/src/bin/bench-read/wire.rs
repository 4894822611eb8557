//! The wire between agents and the store: passes bytes on and notes when each request came and when its answer had gone.

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// One request: its first byte arrived, its answer's last byte had been passed on.
type RoundTrip = (Instant, Instant);

/// A running wire.
pub(crate) struct Wire {
    port: u16,
    trips: Arc<Mutex<Vec<RoundTrip>>>,
}

impl Wire {
    /// Lays a wire to a port of this machine.
    pub(crate) async fn lay(to: u16) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let wire = Self { port: listener.local_addr()?.port(), trips: Arc::default() };
        let trips = Arc::clone(&wire.trips);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let trips = Arc::clone(&trips);
                tokio::spawn(async move {
                    // However a connection ends, its ends see it.
                    let _ = pass(client, to, &trips).await;
                });
            }
        });
        Ok(wire)
    }

    /// Where it begins.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// How long at least one request was under way between two moments.
    pub(crate) fn busy(&self, from: Instant, until: Instant) -> Duration {
        let mut trips: Vec<RoundTrip> = lock(&self.trips)
            .iter()
            .map(|(start, end)| (*start.max(&from), *end.min(&until)))
            .filter(|(start, end)| start < end)
            .collect();
        trips.sort();
        let (mut sum, mut counted) = (Duration::ZERO, from);
        for (start, end) in trips {
            sum += end.saturating_duration_since(start.max(counted));
            counted = counted.max(end);
        }
        sum
    }
}

async fn pass(mut client: TcpStream, to: u16, trips: &Mutex<Vec<RoundTrip>>) -> io::Result<()> {
    let mut store = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
    client.set_nodelay(true)?;
    store.set_nodelay(true)?;
    let (mut up, mut down) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut asked: Option<Instant> = None;
    loop {
        tokio::select! {
            read = client.read(&mut up) => match read? {
                0 => return Ok(()),
                length => {
                    asked.get_or_insert_with(Instant::now);
                    store.write_all(&up[..length]).await?;
                }
            },
            read = store.read(&mut down) => match read? {
                0 => return Ok(()),
                length => {
                    client.write_all(&down[..length]).await?;
                    // An answer in several parts is several trips that follow each other.
                    let now = Instant::now();
                    lock(trips).push((asked.take().unwrap_or(now), now));
                }
            },
        }
    }
}

fn lock(trips: &Mutex<Vec<RoundTrip>>) -> MutexGuard<'_, Vec<RoundTrip>> {
    trips.lock().unwrap_or_else(PoisonError::into_inner)
}
