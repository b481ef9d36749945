//! `inspect` on the released configurations against the accounting of mimo-v2.md B, which matches
//! the vendor's listing to the element. Needs no weights.

mod kilotok;

use kilotok::json;
use serde_json::Value;

fn inspect(config: &str) -> Value {
    let file = format!(
        "{}/../model/tests/released/{config}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    json(&["inspect", "--model", &file, "--json"])
}

fn module(report: &Value, name: &str, key: &str) -> u64 {
    let modules = report["modules"].as_array().unwrap();
    let module = modules.iter().find(|module| module["module"] == name);
    module.unwrap()[key].as_u64().unwrap()
}

/// In units of 10^8 bytes, as the tables round.
fn tenths_of_gb(value: &Value) -> u64 {
    (value.as_u64().unwrap() + 50_000_000) / 100_000_000
}

#[test]
fn mimo_v2_5_pro() {
    let report = inspect("mimo_v2_5_pro");
    assert_eq!(report["parameters"], 1_021_248_126_336u64);
    for (name, parameters) in [
        ("embedding", 937_426_944),
        ("lm_head", 937_426_944),
        ("attention q, k, v", 11_670_650_880),
        ("attention output", 7_046_430_720),
        ("dense FFN", 301_989_888),
        ("experts", 1_000_190_509_056),
    ] {
        assert_eq!(module(&report, name, "parameters"), parameters, "{name}");
    }
    assert_eq!(tenths_of_gb(&report["bytes"]), 10_309);
    assert_eq!(report["kv_bytes_per_token"], 51_200);
    // 129 keys on each of 60 sliding layers.
    assert_eq!(report["kv_bytes_per_sequence"], 129 * 5120 * 60);
}

#[test]
fn mimo_v2_5_pro_fp4() {
    let report = inspect("mimo_v2_5_pro_fp4");
    assert_eq!(report["parameters"], 1_021_248_126_336u64);
    let expert = 20_054_016;
    assert_eq!(module(&report, "experts", "bytes"), 69 * 384 * expert);
    assert_eq!(module(&report, "experts", "active_bytes"), 69 * 8 * expert);
    assert_eq!(tenths_of_gb(&report["bytes"]), 5618);
    assert_eq!(tenths_of_gb(&report["active_bytes_per_token"]), 397);
}

#[test]
fn mimo_v2_flash() {
    let report = inspect("mimo_v2_flash");
    assert_eq!(report["kv_bytes_per_token"], 9 * 1280 * 2);
    assert_eq!(report["kv_bytes_per_sequence"], 129 * 39 * 2560 * 2);
    // 309B in all.
    assert_eq!(report["parameters"].as_u64().unwrap() / 1_000_000_000, 308);
}
