//! The listening process: connections with limits, readiness, and an orderly end.
//!
//! Invariants: every wait has a limit; after the first SIGTERM nothing new is taken and what runs may
//! finish, after the second what runs is cancelled with an error event; a failed engine ends the
//! process within seconds, so that a supervisor can start it again.

use crate::error::ServerError;
use crate::loading::{self, Loading};
use crate::router::router;
use crate::state::{Served, Settings};
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
/// How often it is logged how far loading is.
const LOADING_LINE: Duration = Duration::from_secs(5);
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
    let (listener, address) = listen(&served.settings).await?;
    Ok(Listening {
        served,
        listener,
        address,
    })
}

async fn listen(settings: &Settings) -> Result<(TcpListener, String), ServerError> {
    let (host, port) = (settings.host.as_str(), settings.port);
    let refuse = |source| ServerError::Listen {
        address: format!("{host}:{port}"),
        source,
    };
    let listener = TcpListener::bind((host, port)).await.map_err(refuse)?;
    let address = listener.local_addr().map_err(refuse)?.to_string();
    Ok((listener, address))
}

/// Serves on a runtime of its own until a signal or the engine's failure.
///
/// # Errors
/// [`ServerError`]: the address, the system, or the engine's failure.
pub fn run(served: Arc<Served>, ready: impl FnOnce(&str)) -> Result<(), ServerError> {
    let parts = Arc::clone(&served);
    let ended = runtime()?.block_on(async {
        let listening = bind(served).await?;
        ready(&listening.address);
        listening.serve().await
    });
    parts.end_traces();
    ended
}

/// As [`run`], for a model that `load` loads on a thread of its own: the server listens meanwhile, says how
/// far it is and takes no requests. A signal ends the process without waiting for `load`.
///
/// # Errors
/// As [`run`], and what `load` says.
pub fn run_loading<E: From<ServerError> + Send + 'static>(
    settings: &Settings,
    loading: &Arc<Loading>,
    load: impl FnOnce() -> Result<Arc<Served>, E> + Send + 'static,
    listening: impl FnOnce(&str),
    ready: impl FnOnce(&str),
) -> Result<(), E> {
    runtime()?.block_on(async {
        let (listener, address) = listen(settings).await?;
        listening(&address);
        let Some(served) = while_loading(&listener, settings, loading, load).await? else {
            return Ok(());
        };
        ready(&address);
        let parts = Arc::clone(&served);
        let listening = Listening {
            served,
            listener,
            address,
        };
        let ended = listening.serve().await;
        // It waits for the last spans to be sent.
        let _ = tokio::task::spawn_blocking(move || parts.end_traces()).await;
        Ok(ended?)
    })
}

fn runtime() -> Result<tokio::runtime::Runtime, ServerError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build();
    let what = "cannot start the server's threads";
    runtime.map_err(|source| ServerError::System { what, source })
}

/// Answers until `load` has ended; `None` after a signal.
async fn while_loading<E: From<ServerError> + Send + 'static>(
    listener: &TcpListener,
    settings: &Settings,
    loading: &Arc<Loading>,
    load: impl FnOnce() -> Result<Arc<Served>, E> + Send + 'static,
) -> Result<Option<Arc<Served>>, E> {
    let mut signals = Signals::new()?;
    let (send, mut loaded) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("load".to_owned());
    let spawned = thread.spawn(move || {
        // Nobody waits for it any more when a signal came.
        let _ = send.send(load());
    });
    let what = "cannot start a thread";
    spawned.map_err(|source| ServerError::System { what, source })?;
    let app = loading::router(loading, settings);
    let open = Arc::new(AtomicUsize::new(0));
    let (closing, closed) = watch::channel(false);
    let mut lines = tokio::time::interval(LOADING_LINE);
    lines.tick().await;
    loop {
        tokio::select! {
            ended = &mut loaded => {
                let _ = closing.send(true);
                let panicked = || ServerError::Engine("loading it panicked".to_owned());
                return Ok(Some(ended.map_err(|_| panicked())??));
            },
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => {
                    connect(settings.limits.header_bytes, socket, app.clone(), &open, closed.clone());
                },
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            },
            () = signals.next() => return Ok(None),
            _ = lines.tick() => tracing::info!("{}", loading.now()),
        }
    }
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
        let header_bytes = served.settings.limits.header_bytes;
        let open = Arc::new(AtomicUsize::new(0));
        let (closing, closed) = watch::channel(false);
        let mut watch = tokio::time::interval(WATCH);
        // After a stop of the process one look is enough, not one for each that was missed.
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut draining = false;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((socket, _)) => connect(header_bytes, socket, app.clone(), &open, closed.clone()),
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
    header_bytes: usize,
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
        .max_buf_size(header_bytes)
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
