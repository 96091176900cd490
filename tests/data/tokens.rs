//! Patterns, and token files read as one row.
//!
//! Invariant: a file that is not what it should be is an error that names it and the place.

use crate::support::{fails, folder, read_all, u16_file, u32_file, write};
use ferrotron::data::corpus::{Corpus, TokenType};
use ferrotron::data::files;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

#[test]
fn patterns_find_files_in_the_order_of_their_paths() {
    let root = folder("patterns");
    for name in ["b.txt", "a.txt", "notes.md", "deep/c.txt", "deep/deeper/d.txt", ".hidden.txt", ".git/e.txt", "tokens.bin", "image.png"] {
        write(&root.join(name), if name.ends_with("png") { "\0\0" } else { name });
    }
    let found = |pattern: &str| -> Vec<String> {
        let paths = files::expand(&root.join(pattern)).expect("the pattern matches");
        paths.iter().map(|path| path.strip_prefix(&root).expect("under the root").display().to_string()).collect()
    };
    assert_eq!(found("*.txt"), ["a.txt", "b.txt"]);
    assert_eq!(found("?.txt"), ["a.txt", "b.txt"]);
    assert_eq!(found("**/*.txt"), ["a.txt", "b.txt", "deep/c.txt", "deep/deeper/d.txt"]);
    assert_eq!(found("deep/**"), ["deep/c.txt", "deep/deeper/d.txt"]);
    assert_eq!(found("d*/*.txt"), ["deep/c.txt"]);
    assert_eq!(found("a.txt"), ["a.txt"]);
    assert_eq!(found(""), ["a.txt", "b.txt", "deep/c.txt", "deep/deeper/d.txt", "notes.md"]);
    fails(files::expand(&root.join("*.rst")), &["*.rst", "matches no file"]);
    fails(files::expand(&root.join("de*p")), &["de*p", "folders", "/**"]);
    fails(files::expand(&root.join("gone.txt")), &["gone.txt", "No such file"]);
    fails(files::expand(Path::new("~/corpus.txt")), &["~/corpus.txt", "left to the shell"]);
    fs::create_dir(root.join("empty")).expect("a folder can be made");
    fails(files::expand(&root.join("empty")), &["empty", "no text file", "*.bin"]);
}

#[test]
fn a_name_with_a_star_in_it_is_found_as_it_is_written() {
    let root = folder("literal");
    let odd = write(&root.join("a*b.txt"), "odd");
    write(&root.join("axb.txt"), "even");
    assert_eq!(files::expand(&odd).expect("it is there"), [odd]);
}

#[test]
fn a_circle_of_links_ends() {
    let root = folder("circle");
    write(&root.join("x/a.txt"), "a");
    write(&root.join("y/b.txt"), "b");
    std::os::unix::fs::symlink(root.join("y"), root.join("x/to_y")).expect("links can be made");
    std::os::unix::fs::symlink(root.join("x"), root.join("y/to_x")).expect("links can be made");
    let under_x = files::expand(&root.join("x")).expect("there is text");
    assert_eq!(under_x, [root.join("x/a.txt"), root.join("x/to_y/b.txt")]);
    assert_eq!(files::expand(&root.join("x/**/*.txt")).expect("there is text"), under_x);
}

#[test]
fn files_are_one_row_of_tokens() {
    let root = folder("joined");
    let paths = [
        u16_file(&root.join("a.bin"), 0..10),
        u32_file(&root.join("b.u32.bin"), 10..13),
        u16_file(&root.join("c.bin"), [13]),
        u16_file(&root.join("d.bin"), 14..40),
    ];
    let corpus = Corpus::open(&paths, None, 40).expect("good files");
    assert_eq!(corpus.tokens(), 40);
    assert_eq!(read_all(&corpus), (0..40).collect::<Vec<u32>>());
    for start in 0..40 {
        for end in start..=40 {
            let mut tokens = vec![0; end - start];
            corpus.read(start, &mut tokens).expect("in range");
            assert_eq!(tokens, (start as u32..end as u32).collect::<Vec<u32>>());
        }
    }
    assert_eq!(corpus.locate(11), (paths[1].as_path(), 4));
    assert_eq!((corpus.samples(4), corpus.samples(13), corpus.samples(39), corpus.samples(40)), (9, 3, 1, 0));
    assert!(corpus.name().ends_with("a.bin and 3 more"), "{}", corpus.name());
}

#[test]
fn more_shards_than_files_are_kept_open() {
    let root = folder("many_shards");
    let paths: Vec<PathBuf> = (0..200).map(|i| u16_file(&root.join(format!("{i:03}.bin")), [2 * i, 2 * i + 1])).collect();
    let corpus = Corpus::open(&paths, None, 400).expect("good files");
    for _ in 0..2 {
        assert_eq!(read_all(&corpus), (0..400).collect::<Vec<u32>>());
    }
}

#[test]
fn headers_of_llm_c_are_skipped_and_held_to() {
    let root = folder("llm_c");
    let header = |magic: u32, version: u32, tokens: u32| -> Vec<u8> {
        let mut words = vec![magic, version, tokens];
        words.resize(256, 0);
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    };
    let narrow = write(&root.join("gpt2.bin"), [header(20240520, 1, 3), vec![1, 0, 2, 0, 3, 0]].concat());
    let wide = write(&root.join("llama3.bin"), [header(20240801, 7, 2), vec![4, 0, 0, 0, 0, 1, 0, 0]].concat());
    let corpus = Corpus::open(&[narrow.clone(), wide], None, 1000).expect("good files");
    assert_eq!(read_all(&corpus), [1, 2, 3, 4, 256]);
    assert_eq!(corpus.locate(1), (narrow.as_path(), 1026));
    fails(Corpus::open(&[narrow], Some(TokenType::U32), 1000), &["gpt2.bin", "u32", "u16"]);
    let short = write(&root.join("short.bin"), [header(20240520, 1, 300), vec![0; 4]].concat());
    fails(Corpus::open(&[short], None, 1000), &["short.bin", "300 tokens", "1624 bytes", "1028"]);
}

#[test]
fn a_megatron_index_says_the_type() {
    let root = folder("megatron");
    let index = |code: u8| [b"MMIDIDX\0\0".as_slice(), &1u64.to_le_bytes(), &[code]].concat();
    let wide = u32_file(&root.join("wide_text_document.bin"), [70_000, 5]);
    write(&root.join("wide_text_document.idx"), index(4));
    assert_eq!(read_all(&Corpus::open(&[wide], None, 100_000).expect("good")), [70_000, 5]);
    let double = write(&root.join("double.bin"), [0; 16]);
    write(&root.join("double.idx"), index(6));
    fails(Corpus::open(&[double], None, 10), &["double.idx", "type code 6"]);
    let other = write(&root.join("other.bin"), [0; 16]);
    write(&root.join("other.idx"), [7; 40]);
    fails(Corpus::open(&[other], None, 10), &["other.idx", "no Megatron index"]);
}

#[test]
fn hostile_token_files_are_named() {
    let root = folder("hostile_tokens");
    let odd = write(&root.join("odd.bin"), [1, 0, 2]);
    fails(Corpus::open(std::slice::from_ref(&odd), None, 10), &["odd.bin", "3 bytes", "u16", "cut short"]);
    let odd_wide = write(&root.join("odd.u32.bin"), [1, 0, 2, 0, 0, 0]);
    fails(Corpus::open(&[odd_wide], None, 10), &["odd.u32.bin", "6 bytes", "u32"]);
    let empty = write(&root.join("empty.bin"), []);
    fails(Corpus::open(&[empty], None, 10), &["empty.bin", "holds no tokens"]);
    fails(Corpus::open(&[root.join("gone.bin")], None, 10), &["gone.bin", "No such file"]);
    fails(Corpus::open(std::slice::from_ref(&root), None, 10), &["hostile_tokens", "not a file"]);
}

#[test]
fn an_id_beyond_the_vocabulary_is_named_with_its_place() {
    let root = folder("beyond");
    let paths = [u16_file(&root.join("a.bin"), [0, 1]), u16_file(&root.join("b.bin"), [2, 3, 50_000, 4])];
    let corpus = Corpus::open(&paths, None, 257).expect("ids are checked when read");
    corpus.read(0, &mut [0; 4]).expect("these ids are good");
    fails(corpus.read(1, &mut [0; 5]), &["b.bin, byte 4", "50000", "257", "u16"]);
    assert!(Corpus::open(&paths, None, 50_001).expect("good").read(0, &mut [0; 6]).is_ok(), "the largest id that fits");
}

#[test]
fn a_file_that_changes_under_us_is_named() {
    let root = folder("changes");
    let cut = u16_file(&root.join("cut.bin"), 0..100);
    let corpus = Corpus::open(std::slice::from_ref(&cut), None, 100).expect("good");
    corpus.read(0, &mut [0; 8]).expect("good yet");
    File::options().write(true).open(&cut).and_then(|file| file.set_len(50)).expect("it can be cut");
    fails(corpus.read(90, &mut [0; 8]), &["cut.bin", "byte 180", "200 bytes", "has 50 now"]);

    let gone = u16_file(&root.join("gone.bin"), 0..100);
    let open = Corpus::open(std::slice::from_ref(&gone), None, 100).expect("good");
    let unopened = Corpus::open(std::slice::from_ref(&gone), None, 100).expect("good");
    open.read(0, &mut [0; 8]).expect("good yet");
    fs::remove_file(&gone).expect("it can be removed");
    fails(open.read(0, &mut [0; 8]), &["gone.bin", "byte 0", "removed or replaced"]);
    fails(unopened.read(0, &mut [0; 8]), &["gone.bin", "cannot be opened again", "No such file"]);
}

#[test]
fn fingerprints_tell_data_apart_and_not_places() {
    let root = folder("fingerprints");
    let print = |paths: &[PathBuf]| Corpus::open(paths, None, 60_000).and_then(|corpus| corpus.fingerprint()).expect("good");
    let a = u16_file(&root.join("a.bin"), 0..5000);
    let b = u16_file(&root.join("elsewhere/b.bin"), 0..5000);
    let last_differs = u16_file(&root.join("c.bin"), (0..4999).chain([0]));
    let shorter = u16_file(&root.join("d.bin"), 0..4998);
    assert_eq!(print(std::slice::from_ref(&a)), print(&[b]));
    let prints = [
        print(std::slice::from_ref(&a)),
        print(&[last_differs]),
        print(std::slice::from_ref(&shorter)),
        print(&[a.clone(), shorter.clone()]),
        print(&[shorter, a]),
    ];
    assert_eq!(prints.iter().collect::<BTreeSet<_>>().len(), prints.len(), "{prints:?}");
}
