//! A server process and what may happen to it: signals, readers that stand still or leave, and death
//! at any moment with the admission desk open.

mod child;

use child::{Process, ask, completion};
use serde_json::{Value, json};
use server::admission::{Access, Account, Desk, Seat, SeatRules, Terms, Usage, now_s};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Not a test: the server that the tests start.
#[test]
fn child_server() {
    child::serve_if_asked();
}

/// Tokens that came on a stream, which has to end properly.
fn tokens(stream: &str) -> usize {
    assert!(
        stream.ends_with("data: [DONE]\n\n\r\n0\r\n\r\n"),
        "{stream}"
    );
    stream.matches("\"finish_reason\":null").count()
}

/// Gate 3. `KILOTOK_TEST_DRAINS` sets how many; the figure is of 20.
#[test]
fn the_first_signal_drains() {
    let count = std::env::var("KILOTOK_TEST_DRAINS").map_or(1, |n| n.parse().unwrap());
    let mut times: Vec<f64> = (0..count).map(|_| drain()).collect();
    times.sort_by(f64::total_cmp);
    let (median, most) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{count} drains, 8 streams each whole: not ready after median {median:.1}, most {most:.1} ms"
    );
}

/// Milliseconds from the signal to the first answer that is no 200.
fn drain() -> f64 {
    let mut server = Process::start(&json!({"step_us": 1000}));
    let mut streams: Vec<_> = (0..8).map(|_| server.stream(300).unwrap()).collect();
    server.metric_becomes("vllm:num_requests_running", 8.0);
    server.signal("-TERM");
    let sent = Instant::now();
    let mut refused = server.ask("GET", "/health", None, &Value::Null).unwrap();
    while refused.0 == 200 {
        refused = server.ask("GET", "/health", None, &Value::Null).unwrap();
    }
    let ms = sent.elapsed().as_secs_f64() * 1e3;
    assert_eq!(refused.0, 503);
    let late = server.ask("POST", "/v1/completions", None, &completion(3, true));
    assert_eq!(late.unwrap().0, 503);
    for stream in &mut streams {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(tokens(&text), 300);
    }
    assert!(server.end(Duration::from_secs(20)).success());
    ms
}

#[test]
fn the_second_signal_ends_streams_with_an_error() {
    let mut server = Process::start(&json!({"step_us": 1000}));
    let mut streams: Vec<_> = (0..4).map(|_| server.stream(8000).unwrap()).collect();
    server.metric_becomes("vllm:num_requests_running", 4.0);
    server.signal("-TERM");
    while server.ask("GET", "/health", None, &Value::Null).unwrap().0 == 200 {}
    server.signal("-INT");
    for stream in &mut streams {
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(tokens(&text) < 8000);
        assert!(text.contains("\"code\":\"cancelled\""), "{text}");
    }
    assert!(server.end(Duration::from_secs(20)).success());
}

/// Gate 4: a supervisor has to see that the engine is dead.
#[test]
fn a_failed_engine_ends_the_process() {
    let mut server = Process::start(&json!({"step_us": 1000, "fault_at": 100}));
    let mut text = String::new();
    let mut stream = server.stream(8000).unwrap();
    let _ = stream.read_to_string(&mut text);
    assert!(text.contains("\"error\""), "{text}");
    assert!(!server.end(Duration::from_secs(10)).success());
}

#[test]
fn a_reader_that_stands_still_is_dropped_and_slows_nobody() {
    let setup = json!({"step_us": 0, "reader_timeout_us": 300_000});
    let server = Process::start(&setup);
    // Far more than the sockets of both ends hold.
    let mut body = completion(8000, true);
    body["logprobs"] = 20.into();
    let mut still = server.open("/v1/completions", &body).unwrap();
    let (status, text) = server
        .ask("POST", "/v1/completions", None, &completion(500, true))
        .unwrap();
    assert_eq!((status, tokens(&text)), (200, 500));
    server.metric_becomes("vllm:num_requests_running", 0.0);
    server.metric_becomes("kilotok_kv_pages_used", 0.0);
    let mut text = String::new();
    still.read_to_string(&mut text).unwrap();
    assert!(tokens(&text) < 8000);
    assert!(text.contains("\"code\":\"cancelled\""));
}

/// `KILOTOK_TEST_DISCONNECTS` sets how many; gate 1's figure is of 10,000.
#[test]
fn readers_that_leave_give_everything_back() {
    let count = std::env::var("KILOTOK_TEST_DISCONNECTS");
    let count: u32 = count.map_or(300, |n| n.parse().unwrap());
    let server = Process::start(&json!({"step_us": 200}));
    let leave = |number: u32| {
        let mut socket = server.stream(4000).unwrap();
        // Some before anything came, some amid the head, some amid the tokens.
        let mut bytes = vec![0; (number as usize * 37) % 1500];
        let _ = socket.read_exact(&mut bytes);
    };
    std::thread::scope(|scope| {
        for first in 0..4 {
            scope.spawn(move || (first..count).step_by(4).for_each(leave));
        }
    });
    server.metric_becomes("vllm:num_requests_running", 0.0);
    server.metric_becomes("vllm:num_requests_waiting", 0.0);
    server.metric_becomes("kilotok_streams_open", 0.0);
    server.metric_becomes("kilotok_kv_pages_used", 0.0);
    let (status, text) = server
        .ask("POST", "/v1/completions", None, &completion(5, true))
        .unwrap();
    assert_eq!((status, tokens(&text)), (200, 5));
}

/// Tokens of each answer.
const ANSWER: u32 = 12;
/// Requests a minute of the account that has so few.
const FEW: u32 = 5;

/// What the outside world was told, and what it asked for.
#[derive(Debug, Default)]
struct Ledger {
    sent: AtomicU64,
    answered: AtomicU64,
    applied: AtomicU64,
    few_answered: AtomicU64,
}

/// `KILOTOK_TEST_KILLS` sets how many; the figure is of 100.
#[test]
fn a_killed_server_loses_and_doubles_nothing() {
    let kills = std::env::var("KILOTOK_TEST_KILLS").map_or(100, |n| n.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("desk.db");
    let keys = open_accounts(&file);
    let ledger = Ledger::default();
    let began = now_s();
    let mut random = 1_u64;
    for round in 0..kills {
        let mut server = Process::with_desk(&file);
        let address = server.address.clone();
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        std::thread::scope(|scope| {
            for key in &keys[..2] {
                scope.spawn(|| chats(&address, key, &ledger));
            }
            scope.spawn(|| few(&address, &keys[2], &ledger));
            scope.spawn(|| sits(&address, &keys[3], &keys[4]));
            scope.spawn(|| applies(&address, round, &ledger));
            std::thread::sleep(Duration::from_micros(random >> 40).min(Duration::from_millis(60)));
            server.kill();
        });
        check(&file, &ledger, u64::from(round + 1), began);
    }
    println!("{kills} kills: {ledger:?}");
    assert!(ledger.answered.load(Ordering::Relaxed) > u64::from(kills) / 4);
    let server = Process::with_desk(&file);
    let desk = Desk::open(&file, SeatRules::default()).unwrap();
    for account in desk.accounts().unwrap() {
        let usage = desk.usage(account.id, 0).unwrap();
        assert_eq!(open_requests(&file), 0, "{account:?} {usage:?}");
    }
    // Whoever sat through the kills can still leave, and the next one gets the seat.
    for key in &keys[3..5] {
        server
            .ask("DELETE", "/api/seat", Some(key), &Value::Null)
            .unwrap();
    }
    let (_, seat) = server
        .ask("POST", "/api/seat", Some(&keys[4]), &json!({}))
        .unwrap();
    assert!(seat.contains("seated"), "{seat}");
}

/// Keys of two accounts without limits, one with few requests a minute, and two that chat from seats.
fn open_accounts(file: &Path) -> Vec<String> {
    let desk = Desk::open(file, SeatRules::default()).unwrap();
    let open = |(name, access, requests_per_minute)| {
        let terms = Terms {
            access,
            requests_per_minute,
            tokens_per_minute: 0,
            ..Terms::default()
        };
        desk.apply(name, "a@example.org", "test", now_s()).unwrap();
        desk.approve(name, &terms, now_s()).unwrap()
    };
    let accounts = [
        ("ann", Access::Api, 0),
        ("bob", Access::Api, 0),
        ("few", Access::Api, FEW),
        ("sue", Access::Chat, 0),
        ("tom", Access::Chat, 0),
    ];
    accounts.map(open).into()
}

/// Asks until the server is gone, whole answers and streams in turn.
fn chats(address: &str, key: &str, ledger: &Ledger) {
    for turn in 0.. {
        ledger.sent.fetch_add(1, Ordering::Relaxed);
        let body = completion(ANSWER, turn % 2 == 1);
        let Ok((status, text)) = ask(address, "POST", "/v1/completions", Some(key), &body) else {
            return;
        };
        assert_eq!(status, 200, "{text}");
        ledger.answered.fetch_add(1, Ordering::Relaxed);
    }
}

fn few(address: &str, key: &str, ledger: &Ledger) {
    let body = completion(ANSWER, false);
    while let Ok((status, text)) = ask(address, "POST", "/v1/completions", Some(key), &body) {
        assert!([200, 429].contains(&status), "{text}");
        ledger
            .few_answered
            .fetch_add(u64::from(status == 200), Ordering::Relaxed);
    }
}

/// Two accounts and one seat: enter, chat when seated, leave.
fn sits(address: &str, one: &str, other: &str) {
    loop {
        for key in [one, other] {
            let Ok((200, seat)) = ask(address, "POST", "/api/seat", Some(key), &json!({})) else {
                return;
            };
            let body = completion(3, false);
            let Ok((status, text)) = ask(address, "POST", "/v1/completions", Some(key), &body)
            else {
                return;
            };
            let wanted = if seat.contains("seated") { 200 } else { 403 };
            assert_eq!(status, wanted, "{seat} {text}");
        }
        let Ok(_) = ask(address, "DELETE", "/api/seat", Some(one), &Value::Null) else {
            return;
        };
    }
}

fn applies(address: &str, round: u32, ledger: &Ledger) {
    for turn in 0..50 {
        let name = format!("new-{round}-{turn}");
        let body = json!({"name": name, "contact": "a@example.org", "purpose": "test"});
        match ask(address, "POST", "/api/apply", None, &body) {
            Ok((status, text)) => assert_eq!(status, 200, "{text}"),
            Err(_) => return,
        }
        ledger.applied.fetch_add(1, Ordering::Relaxed);
    }
}

fn open_requests(file: &Path) -> i64 {
    let database = rusqlite::Connection::open(file).unwrap();
    let query = "SELECT count(*) FROM usage WHERE state = 'open'";
    database.query_row(query, [], |row| row.get(0)).unwrap()
}

/// What the file has to hold after `kills` kills, before anybody clears up.
fn check(file: &Path, ledger: &Ledger, kills: u64, began: i64) {
    let desk = Desk::open(
        file,
        SeatRules {
            seats: 1,
            ..SeatRules::default()
        },
    )
    .unwrap();
    let accounts = desk.accounts().unwrap();
    let of = |name: &str| -> (Usage, &Account) {
        let account = accounts.iter().find(|a| a.name == name).unwrap();
        (desk.usage(account.id, 0).unwrap(), account)
    };
    let (ann, bob) = (of("ann").0, of("bob").0);
    let (sent, answered) = (
        ledger.sent.load(Ordering::Relaxed),
        ledger.answered.load(Ordering::Relaxed),
    );
    let requests = ann.requests + bob.requests;
    // Each kill cuts off one request of each of the two at most.
    assert!(
        answered <= requests && requests <= sent,
        "{answered} {requests} {sent}"
    );
    assert!(sent - answered <= 2 * kills);
    assert_eq!(ann.prompt_tokens + bob.prompt_tokens, 3 * requests);
    let generated = ann.generated_tokens + bob.generated_tokens;
    let each = u64::from(ANSWER);
    assert!(generated >= each * answered && generated <= each * requests);
    // What was let in within a minute is within the limit, however often the server began again.
    let minutes = (now_s() - began) as u64 / 60 + 1;
    let few = of("few").0.requests;
    assert!(few >= ledger.few_answered.load(Ordering::Relaxed));
    assert!(
        few <= u64::from(FEW) * minutes,
        "{few} in {minutes} minutes"
    );
    let applied = accounts
        .iter()
        .filter(|a| a.name.starts_with("new-"))
        .count() as u64;
    let told = ledger.applied.load(Ordering::Relaxed);
    assert!((told..=told + kills).contains(&applied), "{told} {applied}");
    let seats = [of("sue").1, of("tom").1].map(|a| desk.seat(a.id, now_s()).unwrap());
    let seated = seats
        .iter()
        .filter(|seat| matches!(seat, Seat::Seated { .. }))
        .count();
    assert!(seated <= 1, "{seats:?}");
}

/// Status of a request whose head has so many bytes, sent in pieces; `None` when no answer came.
fn status_of_head(server: &Process, bytes: usize, piece: usize) -> Option<u16> {
    let line = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: ";
    let head = format!("{line}{}\r\n\r\n", "h".repeat(bytes - line.len() - 4));
    assert_eq!(head.len(), bytes);
    let mut socket = TcpStream::connect(&server.address).unwrap();
    socket.set_nodelay(true).unwrap();
    let limit = Some(Duration::from_secs(20));
    socket.set_read_timeout(limit).unwrap();
    for part in head.as_bytes().chunks(piece) {
        // The server may have answered and closed already.
        if socket.write_all(part).is_err() {
            break;
        }
    }
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).ok()?;
    std::str::from_utf8(&answer[9..]).ok()?.parse().ok()
}

#[test]
fn heads_of_32_kib_are_refused() {
    let server = Process::start(&json!({}));
    const LIMIT: usize = 32 << 10;
    for piece in [1_000, LIMIT / 2, 4 * LIMIT] {
        assert_eq!(status_of_head(&server, LIMIT - 1, piece), Some(200));
        assert_eq!(status_of_head(&server, LIMIT, piece), Some(431));
        assert_eq!(status_of_head(&server, LIMIT + 1, piece), Some(431));
    }
    // The answer may be lost when the server closes before all was sent, but it is never another one.
    let large = status_of_head(&server, 4 << 20, 64 << 10);
    assert!(large.is_none_or(|status| status == 431), "{large:?}");
    assert_eq!(status_of_head(&server, 1_000, 1_000), Some(200));
}
