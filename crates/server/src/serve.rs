//! The listening process: connections with limits, readiness, and an orderly end.
//!
//! Invariants: every wait has a limit; after the first SIGTERM nothing new is taken and what runs may
//! finish, after the second what runs is cancelled with an error event; a failed engine ends the
//! process within seconds, so that a supervisor can start it again.

use crate::error::ServerError;
use crate::router::router;
use crate::state::Served;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

/// A client has this long for the headers of a request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Threads for long texts, grammars and the admission desk. The system's allocator keeps what each of them
/// once needed, up to 100 MB after a text of a megabyte, so that their number bounds the memory.
const BLOCKING_THREADS: usize = 8;
/// How often the engine and the key file are looked at.
const WATCH: Duration = Duration::from_millis(500);
/// Connections get this long to send what they have after the last request ended.
const LINGER: Duration = Duration::from_secs(2);

/// A server that listens.
pub struct Listening {
    served: Arc<Served>,
    listener: TcpListener,
    /// Where, with the port that was taken.
    pub address: String,
}

/// Binds the address.
///
/// # Errors
/// [`ServerError::Listen`].
pub async fn bind(served: Arc<Served>) -> Result<Listening, ServerError> {
    let (host, port) = (served.settings.host.clone(), served.settings.port);
    let wanted = format!("{host}:{port}");
    let refuse = |source| ServerError::Listen {
        address: wanted.clone(),
        source,
    };
    let listener = TcpListener::bind((host.as_str(), port))
        .await
        .map_err(refuse)?;
    let address = listener.local_addr().map_err(refuse)?.to_string();
    Ok(Listening {
        served,
        listener,
        address,
    })
}

/// Serves on a runtime of its own until a signal or the engine's failure.
///
/// # Errors
/// [`ServerError`]: the address, the system, or the engine's failure.
pub fn run(served: Arc<Served>, ready: impl FnOnce(&str)) -> Result<(), ServerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build();
    let what = "cannot start the server's threads";
    let runtime = runtime.map_err(|source| ServerError::System { what, source })?;
    let parts = Arc::clone(&served);
    let ended = runtime.block_on(async {
        let listening = bind(served).await?;
        ready(&listening.address);
        listening.serve().await
    });
    parts.end_traces();
    ended
}

impl Listening {
    /// Serves until a signal or the engine's failure, then drains.
    ///
    /// # Errors
    /// [`ServerError::Engine`] when the engine failed; [`ServerError::System`].
    pub async fn serve(self) -> Result<(), ServerError> {
        let mut signals = Signals::new()?;
        let Self {
            served, listener, ..
        } = self;
        let app = router(&served);
        let open = Arc::new(AtomicUsize::new(0));
        let (closing, closed) = watch::channel(false);
        let mut watch = tokio::time::interval(WATCH);
        // After a stop of the process one look is enough, not one for each that was missed.
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut draining = false;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => connect(&served, socket, app.clone(), &open, closed.clone()),
                    // Out of descriptors: wait for some to come back.
                    Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
                },
                () = signals.next() => {
                    let left = if draining { Duration::ZERO } else { served.settings.shutdown_timeout };
                    tracing::info!(seconds = left.as_secs(), "draining");
                    served.drain();
                    served.engine.drain(left);
                    draining = true;
                },
                _ = watch.tick() => {
                    if served.settings.api_key_file.is_some() {
                        let keys = Arc::clone(&served);
                        tokio::task::spawn_blocking(move || keys.keys.refresh());
                    }
                    if let Some(failure) = served.engine.failure() {
                        end(&open, &closing).await;
                        return Err(ServerError::Engine(failure));
                    }
                    if draining && served.engine.wait_stopped(Duration::ZERO) {
                        break;
                    }
                },
            }
        }
        end(&open, &closing).await;
        Ok(())
    }
}

/// Lets connections send what they have, then closes them.
async fn end(open: &AtomicUsize, closing: &watch::Sender<bool>) {
    let _ = closing.send(true);
    let start = tokio::time::Instant::now();
    while open.load(Ordering::Acquire) > 0 && start.elapsed() < LINGER {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Counts a connection for as long as it lives.
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn connect(
    served: &Served,
    socket: TcpStream,
    app: Router,
    open: &Arc<AtomicUsize>,
    mut closed: watch::Receiver<bool>,
) {
    let counted = Counted::new(open);
    // Small events leave at once.
    let _ = socket.set_nodelay(true);
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(served.settings.limits.header_bytes)
        .max_headers(128);
    tokio::spawn(async move {
        let _counted = counted;
        let service = TowerToHyperService::new(app);
        let connection = builder.serve_connection(TokioIo::new(socket), service);
        let mut connection = std::pin::pin!(connection);
        tokio::select! {
            // A connection's failure concerns its client only, who knows it.
            _ = connection.as_mut() => return,
            _ = closed.wait_for(|closed| *closed) => connection.as_mut().graceful_shutdown(),
        }
        let _ = tokio::time::timeout(LINGER, connection).await;
    });
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> Result<Self, ServerError> {
        let what = "cannot watch for signals";
        let open = |kind| signal(kind).map_err(|source| ServerError::System { what, source });
        Ok(Self {
            terminate: open(SignalKind::terminate())?,
            interrupt: open(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {},
            _ = self.interrupt.recv() => {},
        }
    }
}

/// Log lines to standard error, as text or JSON; `RUST_LOG` chooses what is logged.
pub fn start_logging(json: bool) {
    use tracing_subscriber::EnvFilter;
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,http=warn"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // A subscriber that is there already stays.
    let _ = match json {
        true => builder.json().try_init(),
        false => builder.try_init(),
    };
}
