//! Text pieces: UTF-8 and stop strings, cut into tokens at random.

use engine::text::TextStream;
use proptest::prelude::*;

/// What the whole text gives: cut at the stop string that is complete first, of several the one that
/// begins first.
fn definition(bytes: &[u8], stops: &[String], include: bool) -> (String, bool) {
    let text = String::from_utf8_lossy(bytes).into_owned();
    let matches = stops.iter().filter_map(|stop| {
        let start = text.find(stop.as_str())?;
        Some((start + stop.len(), start))
    });
    match matches.min() {
        Some((end, start)) => (text[..if include { end } else { start }].to_owned(), true),
        None => (text, false),
    }
}

fn stream(bytes: &[u8], cuts: &[usize], stops: &[String], include: bool) -> (String, bool) {
    let mut stream = TextStream::new(stops.to_vec(), include);
    let (mut text, mut rest) = (String::new(), bytes);
    for cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, tail) = rest.split_at((*cut).min(rest.len()));
        rest = tail;
        let before = text.len();
        if stream.push(piece, true, &mut text).is_some() {
            return (text, true);
        }
        // Whatever was shown never has to be taken back.
        assert!(
            definition(bytes, stops, true)
                .0
                .starts_with(&text[..before])
        );
    }
    stream.finish(&mut text);
    (text, false)
}

fn alphabet() -> impl Strategy<Value = String> {
    prop::collection::vec(
        prop::sample::select(vec!["a", "b", "ab", "é", "漢", "\u{1F600}", " "]),
        0..40,
    )
    .prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 3000,
        rng_seed: proptest::test_runner::RngSeed::Fixed(1),
        ..ProptestConfig::default()
    })]

    #[test]
    fn pieces_are_the_whole_cut_at_the_stop(
        text in alphabet(),
        stops in prop::collection::vec("(a|b|é|漢| ){1,4}", 0..4),
        cuts in prop::collection::vec(1usize..6, 1..8),
        include in any::<bool>(),
    ) {
        let whole = definition(text.as_bytes(), &stops, include);
        prop_assert_eq!(stream(text.as_bytes(), &cuts, &stops, include), whole);
    }

    #[test]
    fn bytes_that_are_not_utf8_become_replacement_characters(
        bytes in prop::collection::vec(prop::sample::select(vec![0x61u8, 0x80, 0xC3, 0xA9, 0xE6, 0xBC, 0xF0, 0x9F, 0xFF]), 0..30),
        cuts in prop::collection::vec(1usize..4, 1..5),
    ) {
        let (text, _) = stream(&bytes, &cuts, &[], false);
        prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
    }
}

#[test]
fn a_partial_stop_string_is_held_and_released() {
    let mut stream = TextStream::new(vec!["</end>".into()], false);
    let mut text = String::new();
    assert_eq!(stream.push(b"one </e", true, &mut text), None);
    assert_eq!(text, "one ");
    assert_eq!(stream.push(b"lse <", true, &mut text), None);
    assert_eq!(text, "one </else ");
    stream.finish(&mut text);
    assert_eq!(text, "one </else <");
}

#[test]
fn characters_are_never_split() {
    let mut stream = TextStream::new(Vec::new(), false);
    let mut text = String::new();
    for (byte, shown) in "é漢".bytes().zip(["", "é", "é", "é", "é漢"]) {
        stream.push(&[byte], true, &mut text);
        assert_eq!(text, shown);
    }
}
