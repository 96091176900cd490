//! The door of the rendezvous: strangers, slow ones and impostors are refused in words, and the ranks of the job do not notice.

use ferrotron::comm::door::Job;
use ferrotron::comm::rendezvous::Rendezvous;
use ferrotron::comm::store::Store;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);

fn job(world: usize) -> Job {
    Job::new("job 7", "secret", "layers = 2", world)
}

fn open(world: usize) -> Rendezvous {
    Rendezvous::open(TcpListener::bind("127.0.0.1:0").expect("a free port"), job(world)).expect("opened")
}

fn join(address: SocketAddr, world: usize, rank: usize) -> Store {
    Store::connect(&address.to_string(), &job(world), rank, SOON).expect("a rank of the job")
}

#[test]
fn ranks_share_facts() {
    let rendezvous = open(3);
    std::thread::scope(|scope| {
        for rank in 0..3 {
            let address = rendezvous.address();
            scope.spawn(move || {
                let store = join(address, 3, rank);
                store.set(&format!("of {rank}"), &vec![rank as u8; 100_000 * rank], SOON).expect("set");
                for other in 0..3 {
                    assert_eq!(store.get(&format!("of {other}"), SOON).expect("set by then"), vec![other as u8; 100_000 * other]);
                }
                for _ in 0..20 {
                    store.add("sum", rank as i64 - 5, SOON).expect("added");
                    store.barrier("turn", SOON).expect("all come");
                }
                assert_eq!(store.add("sum", 0, SOON).expect("read"), 20 * (-5 - 4 - 3));
                store.barrier("end", SOON).expect("all come");
            });
        }
    });
    assert_eq!(rendezvous.refusals(), Vec::<String>::new());
}

#[test]
fn waits_end_and_say_who_is_missing() {
    let rendezvous = open(3);
    let stores: Vec<Store> = (0..2).map(|rank| join(rendezvous.address(), 3, rank)).collect();
    let brief = Duration::from_millis(100);
    let error = format!("{:#}", stores[1].get("nobody sets this", brief).expect_err("never set"));
    assert!(error.contains("rank 1 waits for \"nobody sets this\"") && error.contains("gave up after 0.1 s"), "{error}");
    let error = format!("{:#}", stores[0].barrier("step 3", brief).expect_err("rank 2 is not there"));
    assert!(error.contains("rank 0 at the barrier \"step 3\", still missing: rank 1, 2"), "{error}");
    assert!(stores[0].set("large", &vec![0; 65 << 20], SOON).expect_err("too large").to_string().contains("rank 0 sets \"large\""));
}

#[test]
fn the_first_failure_reaches_everybody() {
    let rendezvous = open(3);
    let stores: Vec<Store> = (0..3).map(|rank| join(rendezvous.address(), 3, rank)).collect();
    let heard = Arc::new(AtomicBool::new(false));
    let bell = heard.clone();
    stores[2].on_failure(move |sentence| bell.store(sentence == "rank 1 ran out of disk", Ordering::SeqCst));
    let start = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| format!("{:#}", stores[0].get("never", SOON).expect_err("the job has failed")));
        stores[1].fail("rank 1 ran out of disk");
        stores[2].fail("and so did rank 2");
        assert!(waiting.join().expect("no panic").contains("rank 1 ran out of disk"));
    });
    assert!(start.elapsed() < SOON / 2 && heard.load(Ordering::SeqCst));
    assert_eq!(stores[1].failure().as_deref(), Some("rank 1 ran out of disk"));
}

#[test]
fn the_end_of_rank_0_reaches_everybody() {
    let rendezvous = open(2);
    let store = join(rendezvous.address(), 2, 1);
    drop(rendezvous);
    let error = format!("{:#}", store.get("never", SOON).expect_err("closed"));
    assert!(error.contains("the rendezvous is closed"), "{error}");
    assert_eq!(store.failure(), None, "closing in peace is no failure");
}

#[test]
fn impostors_are_refused_on_both_sides() {
    let rendezvous = open(2);
    let address = rendezvous.address().to_string();
    let first = join(rendezvous.address(), 2, 1);
    let cases = [
        (Job::new("job 7", "guess", "layers = 2", 2), 0, "its token is not that of this job"),
        (Job::new("job 8", "secret", "layers = 2", 2), 0, "it is of another job"),
        (Job::new("job 7", "secret", "layers = 3", 2), 0, "rank 0 runs another configuration"),
        (Job::new("job 7", "secret", "layers = 2", 4), 0, "rank 0 believes in a world of 4 ranks, here it has 2"),
        (job(2), 2, "there is no rank 2, the ranks of this job are 0 to 1"),
        (job(2), 1, "there is a rank 1 already"),
    ];
    for (i, (job, rank, sentence)) in cases.into_iter().enumerate() {
        let error = format!("{:#}", Store::connect(&address, &job, rank, SOON).err().expect("refused"));
        assert!(error.contains(sentence), "case {i}, the caller hears: {error}");
        let deadline = Instant::now() + SOON;
        while rendezvous.refusals().len() <= i && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(rendezvous.refusals()[i].contains(sentence), "case {i}, the host says: {:?}", rendezvous.refusals());
    }
    assert_eq!(first.failure(), None, "the real ranks do not notice");
}

/// A host that does not know the token cannot pass for the rendezvous.
#[test]
fn a_false_host_is_not_believed() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let (mut stream, _) = listener.accept().expect("the caller comes");
            stream.read_exact(&mut [0; 41]).expect("its hello");
            stream.write_all(b"ferrotr1").and_then(|()| stream.write_all(&[7; 32])).expect("a challenge");
            stream.read_exact(&mut [0; 104]).expect("its claim");
            stream.write_all(&[1; 33]).expect("welcome, and a proof of nothing");
        });
        let error = format!("{:#}", Store::connect(&address, &job(2), 1, SOON).err().expect("not believed"));
        assert!(error.contains("does not know the token of this job"), "{error}");
    });
}

/// Garbage, other protocols, absurd lengths, replays, and hundreds who send a byte a second.
#[test]
fn strangers_do_not_disturb_the_job() {
    let rendezvous = open(4);
    let address = rendezvous.address();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let slow: Vec<TcpStream> = (0..300).map(|_| TcpStream::connect(address).expect("connected")).collect();
        let stop = &stop;
        scope.spawn(move || {
            for _ in 0..60 {
                slow.iter().for_each(|mut stream| drop(stream.write(b"f")));
                std::thread::sleep(Duration::from_millis(300));
                if stop.load(Ordering::SeqCst) {
                    return;
                }
            }
        });
        let say = |bytes: &[u8]| {
            let mut stream = TcpStream::connect(address).expect("connected");
            stream.write_all(bytes).expect("sent");
            stream.set_read_timeout(Some(SOON)).expect("set");
            let mut answer = Vec::new();
            // A reset is as good as an end.
            stream.read_to_end(&mut answer).ok();
            answer
        };
        assert_eq!(say(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"), b"");
        assert_eq!(say(&[0xff; 4096]), b"");
        assert_eq!(say(&u32::MAX.to_le_bytes().repeat(4)), b"");
        assert_eq!(say(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"), b"");
        // The right protocol with a proof of nothing is refused in a sentence.
        let refused = say(&[b"ferrotr1\x01".as_slice(), &[3; 32 + 104]].concat());
        assert!(String::from_utf8_lossy(&refused).contains("its token is not that of this job"), "{refused:?}");
        let start = Instant::now();
        let stores: Vec<Store> = (0..4).map(|rank| join(address, 4, rank)).collect();
        std::thread::scope(|ranks| stores.iter().for_each(|store| drop(ranks.spawn(|| store.barrier("all", SOON).expect("all come")))));
        let took = start.elapsed();
        stop.store(true, Ordering::SeqCst);
        assert!(took < Duration::from_secs(2), "the ranks took {took:?} to meet");
    });
    assert!(rendezvous.refusals().len() <= 32);
    assert!(rendezvous.refusals().iter().all(|sentence| sentence.contains("refused 127.0.0.1:")), "{:?}", rendezvous.refusals());
}
