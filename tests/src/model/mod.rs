//! The reference model of the dataplane, and the runs that compare the loaded program with it.
//!
//! [`decide::decide`] says what must happen to a packet, given the tables: verdict, bytes, changes of the tables, counters.
//! It is written from the RFCs and the design, and takes nothing from the program's own rules but map layouts and the names
//! of reasons: hashes, checksums, states and timeouts are its own. [`run::fuzz`] draws worlds and packets, runs each packet
//! through the program by BPF_PROG_TEST_RUN and through the model, and compares.
//!
//! Both families go one way: tuples and entries have one form ([`flow`]), and [`wire`] reads either header. What differs is
//! decided where it does: extension headers, fragments by their header, no checksum of the header and no UDP without one, whose
//! limits a source has, what an error quotes.
//!
//! Time: the program reads the coarse clock, which the run reads before and after; a packet that a tick falls into may
//! have seen either. What it stamps by the precise clock lies between the coarse one before and the precise one after.
//! A source's token buckets depend on the precise clock: what the program left of one must be what some moment of its run
//! leaves, and is taken over. Longer times pass by making every entry and bucket older, in the maps and in the model.
//!
//! Backends are chosen as they are by every method ([`choose`]): by Maglev's table, by turns, or as the less loaded of two, with
//! backup tiers, limits, homes of clients, and the weight of a backend that starts slowly. Turns, homes and loads are compared
//! like entries. What half-open flows weigh against a limit is an estimate, but one that follows from the clock. How many flows a
//! backend has, and where clients are at home, is also set from outside: the daemon counts flows anew, an LRU table forgets,
//! and a number is given to another backend.
//!
//! How fast ICMP messages of our own follow each other depends on the run's speed, so that either of "sent" and "limited" is
//! taken.
//!
//! Where the program is free (SNAT port, jitter of the touch, the ID of a fragmented packet with a new source), the model
//! checks its choice against the rules and takes it over. A new concern (a protocol, a limit) is a new stage file beside
//! `connections`, `create` and `forward`, called from `decide`, with its branches in `coverage` and its packets in `generate`.

pub mod checksum;
pub mod choose;
pub mod compare;
pub mod connections;
pub mod coverage;
pub mod create;
pub mod decide;
pub mod dice;
pub mod flow;
pub mod forward;
pub mod fragments;
pub mod generate;
pub mod hash;
pub mod icmp;
pub mod kernel;
pub mod midflow;
pub mod moves;
pub mod mss;
pub mod network;
pub mod protect;
pub mod run;
pub mod state;
pub mod told;
pub mod wire;
pub mod world;
