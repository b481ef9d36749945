use super::*;
use tempfile::TempDir;

const NOON: i64 = 1_800_000_000;

fn desk(seats: u32) -> (TempDir, Desk) {
    let dir = tempfile::tempdir().unwrap();
    let rules = SeatRules {
        seats,
        ..SeatRules::default()
    };
    let desk = Desk::open_serving(&dir.path().join("desk.db"), rules, NOON).unwrap();
    (dir, desk)
}

fn member(desk: &Desk, name: &str, terms: &Terms) -> (String, i64) {
    let account = desk.apply(name, "a@example.org", "testing", NOON).unwrap();
    (desk.approve(name, terms, NOON).unwrap(), account)
}

fn api(requests: u32, tokens: u32) -> Terms {
    Terms {
        access: Access::Api,
        requests_per_minute: requests,
        tokens_per_minute: tokens,
        ..Terms::default()
    }
}

#[test]
fn a_key_works_from_approval_to_revocation_and_is_kept_as_a_hash() {
    let (dir, desk) = desk(0);
    desk.apply("ann", "ann@example.org", "testing", NOON)
        .unwrap();
    assert!(desk.apply("ann", "x", "y", NOON).is_err());
    let key = desk.approve("ann", &Terms::default(), NOON).unwrap();
    assert!(desk.owner(&key).unwrap().is_some());
    assert!(desk.owner(&key[..key.len() - 1]).unwrap().is_none());
    for file in std::fs::read_dir(dir.path()).unwrap() {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let found = bytes.windows(key.len()).any(|w| w == key.as_bytes());
        assert!(!found, "the key is in the file");
    }
    desk.revoke("ann", NOON).unwrap();
    assert!(desk.owner(&key).unwrap().is_none());
    assert_eq!(desk.accounts().unwrap()[0].state, AccountState::Revoked);
}

#[test]
fn limits_refuse_with_the_time_until_there_is_room() {
    let (_dir, desk) = desk(0);
    let (key, _) = member(&desk, "bob", &api(2, 100));
    let owner = desk.owner(&key).unwrap().unwrap();
    let ticket = desk.begin(owner, 30, NOON).unwrap().unwrap();
    desk.settle(ticket, 60, 0).unwrap();
    let over = desk.begin(owner, 11, NOON + 10).unwrap().unwrap_err();
    let (limit, allowed, retry_after_s) = ("tokens", 100, 50);
    assert_eq!(
        over,
        Refusal::Quota {
            limit,
            allowed,
            retry_after_s
        }
    );
    desk.begin(owner, 10, NOON + 10).unwrap().unwrap();
    let over = desk.begin(owner, 0, NOON + 20).unwrap().unwrap_err();
    assert!(matches!(
        over,
        Refusal::Quota {
            limit: "requests",
            retry_after_s: 40,
            ..
        }
    ));
    assert!(desk.begin(owner, 1, NOON + 61).unwrap().is_ok());
}

#[test]
fn access_has_a_window() {
    let (_dir, desk) = desk(0);
    let terms = Terms {
        starts_at: Some(NOON + 10),
        ends_at: Some(NOON + 20),
        ..api(0, 0)
    };
    let (key, _) = member(&desk, "eve", &terms);
    let owner = desk.owner(&key).unwrap().unwrap();
    let early = desk.begin(owner, 1, NOON).unwrap().unwrap_err();
    assert_eq!(
        early,
        Refusal::Window {
            opens_at: Some(NOON + 10)
        }
    );
    assert!(desk.begin(owner, 1, NOON + 10).unwrap().is_ok());
    let late = desk.begin(owner, 1, NOON + 20).unwrap().unwrap_err();
    assert_eq!(late, Refusal::Window { opens_at: None });
}

#[test]
fn usage_is_settled_once_and_survives_a_killed_server() {
    let (dir, desk) = desk(0);
    let terms = Terms {
        price_multiplier: 3.0,
        ..api(0, 0)
    };
    let (key, account) = member(&desk, "bob", &terms);
    let owner = desk.owner(&key).unwrap().unwrap();
    let done = desk.begin(owner, 10, NOON).unwrap().unwrap();
    desk.settle(done, 5, 2).unwrap();
    desk.settle(done, 500, 2).unwrap();
    let lost = desk.begin(owner, 7, NOON).unwrap().unwrap();
    drop(desk);
    let path = dir.path().join("desk.db");
    let desk = Desk::open_serving(&path, SeatRules::default(), NOON).unwrap();
    desk.settle(lost, 9, 0).unwrap();
    let usage = desk.usage(account, 0).unwrap();
    assert_eq!((usage.requests, usage.interrupted), (2, 1));
    assert_eq!(
        (
            usage.prompt_tokens,
            usage.generated_tokens,
            usage.cached_tokens
        ),
        (17, 5, 2)
    );
    assert!((usage.billed_tokens - 66.0).abs() < 1e-9);
}

#[test]
fn one_server_at_a_time() {
    let (dir, _desk) = desk(0);
    let path = dir.path().join("desk.db");
    assert!(Desk::open_serving(&path, SeatRules::default(), NOON).is_err());
    assert!(Desk::open(&path, SeatRules::default()).is_ok());
}

#[test]
fn seats_go_in_order_and_come_back_when_expired_idle_or_left() {
    let (_dir, desk) = desk(1);
    let ids: Vec<i64> = ["a", "b", "c"]
        .iter()
        .map(|name| member(&desk, name, &Terms::default()).1)
        .collect();
    let seated = |left_s, idle_left_s| Seat::Seated {
        left_s,
        idle_left_s,
    };
    let waiting = |position, waiting| Seat::Waiting { position, waiting };
    assert_eq!(desk.enter(ids[0], NOON).unwrap(), seated(1800, 300));
    assert_eq!(desk.enter(ids[1], NOON + 1).unwrap(), waiting(1, 1));
    assert_eq!(desk.enter(ids[2], NOON + 2).unwrap(), waiting(2, 2));
    assert_eq!(
        desk.enter(ids[1], NOON + 3).unwrap(),
        waiting(1, 2),
        "once in the queue"
    );
    // Whoever waits keeps polling; the seat is idle after five minutes.
    for t in (30..=300).step_by(30) {
        desk.seat(ids[1], NOON + t).unwrap();
        desk.seat(ids[2], NOON + t).unwrap();
    }
    let last_end = Some("idle".to_owned());
    let entries_left = 9;
    assert_eq!(
        desk.seat(ids[0], NOON + 301).unwrap(),
        Seat::None {
            entries_left,
            last_end
        }
    );
    assert!(matches!(
        desk.seat(ids[1], NOON + 302).unwrap(),
        Seat::Seated { .. }
    ));
    assert!(matches!(
        desk.leave(ids[1], NOON + 303).unwrap(),
        Seat::None { .. }
    ));
    assert!(matches!(
        desk.seat(ids[2], NOON + 304).unwrap(),
        Seat::Seated { .. }
    ));
}

#[test]
fn chat_needs_a_seat_and_using_it_keeps_it_until_the_session_ends() {
    let (_dir, desk) = desk(1);
    let (key, account) = member(&desk, "a", &Terms::default());
    let owner = desk.owner(&key).unwrap().unwrap();
    assert_eq!(
        desk.begin(owner, 1, NOON).unwrap().unwrap_err(),
        Refusal::NoSeat
    );
    desk.enter(account, NOON).unwrap();
    for t in (0..1800).step_by(200) {
        assert!(desk.begin(owner, 1, NOON + t).unwrap().is_ok());
    }
    assert_eq!(
        desk.begin(owner, 1, NOON + 1800).unwrap().unwrap_err(),
        Refusal::NoSeat
    );
}

#[test]
fn ten_entries_a_day() {
    let (_dir, desk) = desk(1);
    let (_, account) = member(&desk, "a", &Terms::default());
    for t in 0..10 {
        desk.enter(account, NOON + t).unwrap();
        desk.leave(account, NOON + t).unwrap();
    }
    assert!(desk.enter(account, NOON + 11).is_err());
    assert!(desk.enter(account, NOON + 86_400).is_ok());
}

#[test]
fn whoever_waits_is_still_there_after_a_restart() {
    let (dir, desk) = desk(1);
    let a = member(&desk, "a", &Terms::default()).1;
    let b = member(&desk, "b", &Terms::default()).1;
    desk.enter(a, NOON).unwrap();
    desk.enter(b, NOON).unwrap();
    let rules = desk.rules().clone();
    drop(desk);
    let desk = Desk::open_serving(&dir.path().join("desk.db"), rules, NOON + 200).unwrap();
    let (left_s, idle_left_s) = (1600, 300);
    assert_eq!(
        desk.seat(a, NOON + 200).unwrap(),
        Seat::Seated {
            left_s,
            idle_left_s
        }
    );
    assert!(matches!(
        desk.seat(b, NOON + 200).unwrap(),
        Seat::Waiting { position: 1, .. }
    ));
}
