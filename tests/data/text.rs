//! Text to shards and back, and sources of all kinds.
//!
//! Invariant: whatever goes wrong, no half-made data set is left or read.

use crate::support::{encode, fails, folder, names_in, prepare, prepared_tokens, read_all, source, u16_file, u32_file, write};
use ferrotron::data::corpus::TokenType;
use ferrotron::data::prepare;
use ferrotron::data::sources::{self, Source};
use ferrotron::data::tokenizer::Tokenizer;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::thread;

#[test]
fn bytes_come_back_as_they_were() {
    let every_byte: Vec<u8> = (0..=255).collect();
    let mut tokens = Vec::new();
    Tokenizer::Bytes.encode(&every_byte, &mut tokens);
    assert_eq!(tokens, (0..256).collect::<Vec<u32>>());
    assert_eq!(Tokenizer::Bytes.decode(&tokens), every_byte);
    assert_eq!((Tokenizer::Bytes.vocabulary(), Tokenizer::Bytes.end_of_text()), (257, Some(256)));
    assert_eq!(Tokenizer::Bytes.decode(&[104, 105, 256, 300]), "hi<|endoftext|>\u{FFFD}".as_bytes());
}

#[test]
fn other_tokenizers_are_refused_with_a_way_out() {
    assert_eq!(Tokenizer::from_name("bytes").expect("known"), Tokenizer::Bytes);
    fails(Tokenizer::from_name("models/tokenizer.json"), &["models/tokenizer.json", "not read yet", "\"bytes\"", ".bin"]);
    fails(Tokenizer::from_name("gpt2"), &["\"gpt2\"", "\"bytes\""]);
}

#[test]
fn each_document_is_followed_by_an_end_of_text() {
    let root = folder("documents");
    let text = write(&root.join("in/a.txt"), "ab");
    write(&root.join("in/b.txt"), "");
    write(&root.join("in/c.md"), [0xff, 0xfe, b'\n']);
    let lines =
        write(&root.join("in/d.jsonl"), "{\"text\": \"x\\u00e9\", \"id\": 7}\n\n  \n{\"id\": 8, \"text\": \"\"}\r\n{\"text\": \"y\"}");
    let prepared = prepare(&[&root.join("in")], &root.join("out")).expect("good text");
    let expected = [97, 98, 256, 0xff, 0xfe, 10, 256, 120, 0xc3, 0xa9, 256, 121, 256];
    assert_eq!(prepared_tokens(&prepared), expected);
    let manifest = &prepared.manifest;
    assert_eq!((manifest.tokens, manifest.documents, manifest.sources.len()), (13, 4, 4));
    assert_eq!((manifest.dtype, manifest.vocabulary, manifest.tokenizer.as_str()), (TokenType::U16, 257, "bytes"));
    // In the order asked for, and twice when asked for twice.
    let turned = prepare(&[&lines, &text, &text], &root.join("turned")).expect("good text");
    assert_eq!(prepared_tokens(&turned), [120, 0xc3, 0xa9, 256, 121, 256, 97, 98, 256, 97, 98, 256]);
}

#[test]
fn a_data_set_is_reused_until_a_source_changes() {
    let root = folder("reuse");
    let (a, out) = (write(&root.join("a.txt"), "one"), root.join("out"));
    let first = prepare(&[&a], &out).expect("good");
    assert!(!first.reused);
    let again = prepare(&[&a], &out).expect("good");
    assert!(again.reused);
    assert_eq!(again.manifest, first.manifest);
    write(&a, "one more");
    let changed = prepare(&[&a], &out).expect("good");
    assert!(!changed.reused);
    assert_eq!(prepared_tokens(&changed), [encode("one more"), vec![256]].concat());
    // What the old manifest named is gone, and so is everything unfinished.
    let names: BTreeSet<String> = names_in(&out);
    let expected = BTreeSet::from(["manifest.json".to_string(), changed.manifest.shards[0].file.clone()]);
    assert_eq!(names, expected);
    // A damaged shard is not reused.
    let shard = out.join(&changed.manifest.shards[0].file);
    File::options().write(true).open(shard).and_then(|file| file.set_len(2)).expect("it can be cut");
    let repaired = prepare(&[&a], &out).expect("good");
    assert!(!repaired.reused);
    assert_eq!(prepared_tokens(&repaired), prepared_tokens(&prepare(&[&a], &out).expect("good")));
}

#[test]
fn what_a_killed_writer_left_is_swept() {
    let root = folder("swept");
    let (a, out) = (write(&root.join("a.txt"), "text"), root.join("out"));
    for left in ["tokens-0123456789abcdef-99-0.lock", "tokens-0123456789abcdef-99-0-00000.bin.tmp", "tokens-0123456789abcdef-99-0.json.tmp"]
    {
        write(&out.join(left), "left");
    }
    // A writer that lives: its lock is held.
    let lock = out.join("tokens-0123456789abcdef-99-1.lock");
    let alive = File::create(&lock).expect("a file can be made");
    alive.lock().expect("it can be locked");
    write(&out.join("tokens-0123456789abcdef-99-1-00000.bin.tmp"), "kept");
    let prepared = prepare(&[&a], &out).expect("good");
    let expected = [
        "manifest.json",
        "tokens-0123456789abcdef-99-1-00000.bin.tmp",
        "tokens-0123456789abcdef-99-1.lock",
        &prepared.manifest.shards[0].file,
    ];
    assert_eq!(names_in(&out), expected.map(str::to_string).into());
}

#[test]
fn shards_are_cut_at_their_size_and_read_as_one() {
    let root = folder("cut");
    let long = "0123456789".repeat(100);
    let inputs = [write(&root.join("a.txt"), &long), write(&root.join("b.txt"), "tail")];
    let prepared = prepare::prepare_in_shards(&inputs, &Tokenizer::Bytes, &root.join("out"), 64).expect("good");
    assert_eq!(prepared.manifest.shards.len(), 1006usize.div_ceil(64));
    assert_eq!(prepared.manifest.tokens, 1006);
    assert_eq!(prepared_tokens(&prepared), [encode(&long), vec![256], encode("tail"), vec![256]].concat());
}

#[test]
fn many_may_prepare_the_same_at_once() {
    let root = folder("at_once");
    let out = root.join("out");
    let text = "to be or not to be ".repeat(5000);
    let inputs = [write(&root.join("a.txt"), &text)];
    let expected = [encode(&text), vec![256]].concat();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5 {
                    let prepared = prepare::prepare_in_shards(&inputs, &Tokenizer::Bytes, &out, 20_000).expect("good");
                    assert_eq!(prepared_tokens(&prepared), expected);
                }
            });
        }
    });
    let left: Vec<String> = names_in(&out).into_iter().filter(|name| !name.ends_with(".bin") && name != "manifest.json").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn hostile_texts_are_named() {
    let root = folder("hostile_texts");
    let out = root.join("out");
    let bad = write(&root.join("bad.jsonl"), "{\"text\": \"fine\"}\n{\"text\": \"torn");
    let message = fails(prepare(&[&bad], &out), &["bad.jsonl, line 2", "column 14", "EOF", "{\"text\": \"...\"}"]);
    assert!(!message.contains("line 1"), "{message}");
    let other = write(&root.join("other.jsonl"), "{\"content\": \"x\"}\n");
    fails(prepare(&[&other], &out), &["other.jsonl, line 1", "missing field `text`"]);
    let number = write(&root.join("number.jsonl"), "\n\n{\"text\": 5}\n");
    fails(prepare(&[&number], &out), &["number.jsonl, line 3", "invalid type"]);
    let latin = write(&root.join("latin.jsonl"), b"{\"text\": \"caf\xe9\"}\n");
    fails(prepare(&[&latin], &out), &["latin.jsonl, line 1", "invalid unicode"]);
    let empty = write(&root.join("empty.txt"), "");
    fails(prepare(&[&empty], &out), &["empty.txt", "no text"]);
    fails(prepare(&[&write(&root.join("a.jsonl.zst"), "x")], &out), &["a.jsonl.zst", "compressed"]);
    fails(prepare(&[&u16_file(&root.join("a.bin"), [1])], &out), &["a.bin", "raw tokens"]);
    fails(prepare(&[&root.join("none/*.txt")], &out), &["none/*.txt", "matches no file"]);
    fails(prepare(&[], &out), &["nothing to prepare"]);
    let good = write(&root.join("good.txt"), "good");
    fails(prepare(&[&good], &good), &["good.txt is a file"]);
    // None of these left anything behind.
    assert_eq!(if out.exists() { names_in(&out) } else { BTreeSet::new() }, BTreeSet::new());
    write(&root.join("foreign/manifest.json"), "{\"name\": \"something else\"}");
    fails(prepare(&[&good], &root.join("foreign")), &["foreign/manifest.json", "not written by `ferrotron prepare`"]);
}

#[test]
fn sources_are_told_apart_by_what_they_are() {
    let root = folder("sources");
    let cache = root.join("cache");
    write(&root.join("text/b.txt"), "bb");
    write(&root.join("text/a.txt"), "a");
    u16_file(&root.join("raw/1.bin"), [1, 2]);
    u16_file(&root.join("raw/2.bin"), [3]);
    u32_file(&root.join("wide.bin"), [7, 8]);
    prepare(&[&root.join("text/b.txt")], &root.join("shards")).expect("good");
    let list = [
        source(&root.join("text/*.txt")),
        Source { weight: 0.5, ..source(&root.join("raw/*.bin")) },
        source(&root.join("shards")),
        Source { dtype: Some(TokenType::U32), ..source(&root.join("wide.bin")) },
        source(&root.join("text")),
    ];
    for _ in 0..2 {
        let opened = sources::open(&list, &Tokenizer::Bytes, &cache, 257).expect("good sources");
        let tokens: Vec<Vec<u32>> = opened.iter().map(|(corpus, _)| read_all(corpus)).collect();
        assert_eq!(tokens, [vec![97, 256, 98, 98, 256], vec![1, 2, 3], vec![98, 98, 256], vec![7, 8], vec![97, 256, 98, 98, 256]]);
        assert_eq!(opened.iter().map(|(_, weight)| *weight).collect::<Vec<f64>>(), [1.0, 0.5, 1.0, 1.0, 1.0]);
    }
    assert_eq!(names_in(&cache).len(), 2, "one folder for each source of text");
    // A source that grew is prepared again.
    write(&root.join("text/c.txt"), "c");
    let opened = sources::open(&list[..1], &Tokenizer::Bytes, &cache, 257).expect("good sources");
    assert_eq!(read_all(&opened[0].0), [97, 256, 98, 98, 256, 99, 256]);
}

#[test]
fn hostile_sources_are_named() {
    let root = folder("hostile_sources");
    let cache = root.join("cache");
    let text = write(&root.join("a.txt"), "text");
    let raw = u16_file(&root.join("b.bin"), [1, 2]);
    let open = |source: Source, vocabulary| sources::open(&[source], &Tokenizer::Bytes, &cache, vocabulary);
    fails(open(source(&text), 256), &["a.txt", "\"bytes\" has 257 ids", "model.vocab_size = 256"]);
    open(source(&raw), 10).expect("raw tokens are held to the model's vocabulary, not to the tokenizer's");
    fails(open(source(&root.join("*")), 300), &["b.bin", "a.txt", "source of its own"]);
    fails(open(source(&root.join("*.rst")), 300), &["data source", "*.rst", "matches no file"]);
    fails(open(Source { weight: 0.0, ..source(&text) }, 300), &["a.txt", "weight = 0", "positive"]);
    fails(open(Source { weight: f64::NAN, ..source(&text) }, 300), &["weight = NaN"]);
    fails(open(Source { dtype: Some(TokenType::U16), ..source(&text) }, 300), &["a.txt", "dtype = \"u16\"", "raw .bin"]);
    prepare(&[&text], &root.join("shards")).expect("good");
    fails(open(source(&root.join("shards")), 100), &["shards", "257 ids", "100"]);
    let manifest = root.join("shards/manifest.json");
    let written = fs::read_to_string(&manifest).expect("a manifest");
    let print = format!("{:016x}", Tokenizer::Bytes.fingerprint());
    write(&manifest, written.replace(&print, "00000000000000ff"));
    fails(open(source(&root.join("shards")), 300), &["00000000000000ff", "data.tokenizer is \"bytes\""]);
    write(&manifest, written.replace("tokens-", "../tokens-"));
    fails(open(source(&root.join("shards")), 300), &["manifest.json", "not the name of a file"]);
    write(&manifest, written.replace("\"version\": 1", "\"version\": 9"));
    fails(open(source(&root.join("shards")), 300), &["another version", "prepare it again"]);
    write(&manifest, &written);
    let shard = names_in(&root.join("shards")).into_iter().find(|name| name.ends_with(".bin")).expect("a shard");
    write(&root.join("shards").join(shard), [0; 4]);
    fails(open(source(&root.join("shards")), 300), &["has 4 bytes", "says 10", "prepare it again"]);
}
