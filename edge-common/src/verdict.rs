//! What the pipeline decides about a packet, and why. A reason's number is its counter's index.

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give it to the stack as it is now (untouched, or rewritten where the reason says so).
    Pass,
    /// Send it out of the interface it came in by.
    Transmit,
    /// Send it out of another interface, by ifindex.
    Redirect(u32),
    /// Send it out of the interface it came in by, under the VLAN tags that it came with.
    Return,
    /// Send it under the VLAN tags and out of the interface of the next hop of this number; true where that is the interface
    /// it came in by.
    Tagged(u32, bool),
    /// Drop it; the reason has been counted.
    Drop,
}

/// What an ICMP message of our own is about. Numbers as in [`Verdict`]: even, since nothing is sent yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Question {
    /// The TTL or hop limit ended here.
    TimeExceeded = 8,
    /// Longer than the next hop's MTU, and not to be fragmented.
    TooBig = 10,
}

/// An [`Action`] in one register, which is all a BPF function can return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Verdict(u64);

impl Verdict {
    /// [`Action::Pass`].
    pub const PASS: Self = Self(0);
    /// [`Action::Transmit`].
    pub const TRANSMIT: Self = Self(1);
    /// [`Action::Drop`].
    pub const DROP: Self = Self(2);

    /// [`Action::Return`].
    pub const RETURN: Self = Self(5);

    /// [`Action::Drop`], with its reason's number, the service's, and whether it is one to report.
    #[inline(always)]
    pub const fn dropped(reason: Reason, service: u32, report: bool) -> Self {
        let report = if report { 1_u64 << 63 } else { 0 };
        Self(report | ((service & 0xffff) as u64) << 40 | (reason as u64) << 32 | 2)
    }

    /// The reason's and the service's number of a drop that is to be reported.
    #[inline(always)]
    pub const fn reported(self) -> Option<(u8, u32)> {
        if self.0 >> 63 == 0 || self.0 as u32 != 2 {
            return None;
        }
        Some(((self.0 >> 32) as u8, (self.0 >> 40) as u32 & 0xffff))
    }

    /// True where the packet leaves from here: the one question of the hot path.
    #[inline(always)]
    pub const fn is_sent(self) -> bool {
        self.0 & 1 != 0
    }

    /// No decision yet: for a stage that leaves the packet to the next one. Dropped where nothing decides.
    pub const UNDECIDED: Self = Self(4);

    /// For a stage that leaves the packet to be sent to the next one. Dropped where nothing sends it.
    pub const FORWARD: Self = Self(6);

    /// For a stage that leaves a packet in mid-flow, which has no flow, to the one for those. Dropped where nothing decides.
    pub const MID_FLOW: Self = Self(0xfe);

    /// The sender is to be told by ICMP, and the packet dropped, which is what [`Verdict::action`] says of it: `question`
    /// and `service` below 256 and 65,536. Leaves the packet as it came.
    #[inline(always)]
    pub const fn answer(question: Question, service: u32, mtu: u32) -> Self {
        Self((mtu as u64) << 32 | (service as u64 & 0xffff) << 16 | question as u64)
    }

    /// What the sender is to be told, for which service, and the MTU (bytes) it is told.
    #[inline(always)]
    pub const fn question(self) -> Option<(Question, u32, u32)> {
        let (service, mtu) = ((self.0 >> 16) as u32 & 0xffff, (self.0 >> 32) as u32);
        match self.0 as u32 & 0xff {
            8 => Some((Question::TimeExceeded, service, mtu)),
            10 => Some((Question::TooBig, service, mtu)),
            _ => None,
        }
    }

    /// [`Action::Redirect`].
    #[inline(always)]
    pub const fn redirect(ifindex: u32) -> Self {
        Self((ifindex as u64) << 32 | 3)
    }

    /// [`Action::Tagged`].
    #[inline(always)]
    pub const fn tagged(next_hop: u32, same_interface: bool) -> Self {
        Self((next_hop as u64) << 32 | if same_interface { 9 } else { 7 })
    }

    /// What it says.
    #[inline(always)]
    pub const fn action(self) -> Action {
        match self.0 as u32 {
            0 => Action::Pass,
            1 => Action::Transmit,
            3 => Action::Redirect((self.0 >> 32) as u32),
            5 => Action::Return,
            7 => Action::Tagged((self.0 >> 32) as u32, false),
            9 => Action::Tagged((self.0 >> 32) as u32, true),
            _ => Action::Drop,
        }
    }
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal;)*) => {
        /// Why a packet was dropped, or passed although its address is ours.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason { $($(#[$doc])* $variant = $number,)* }

        impl Reason {
            /// Every reason, by number.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The name that users see in counters, metrics and logs.
            pub const fn name(self) -> &'static str {
                match self { $(Reason::$variant => $name,)* }
            }
        }
    };
}

/// Counters per service; a power of two above the highest reason number.
pub const REASONS: u32 = 64;

reasons! {
    /// Passed: our address, but no frontend and no flow (other ports of a shared address, ARP aside).
    NoFrontend = 0, "no-frontend";
    /// Passed: mid-flow packet of a frontend without a flow; the kernel answers (RST, port unreachable).
    NoFlow = 1, "no-flow";
    /// Passed rewritten: the next hop's neighbour is not resolved yet, the stack resolves it.
    NeighbourUnresolved = 2, "neighbour-unresolved";
    /// Passed rewritten: egress interface cannot take redirected packets.
    ViaStack = 3, "via-stack";
    /// Passed: a later fragment to or from one of our addresses whose first one has not been seen, or is nobody's of ours.
    Fragment = 4, "fragment";
    /// Passed: IPv6 extension headers that only the stack can judge: too many, or a routing header not done with.
    ExtensionHeaders = 54, "extension-headers";
    /// Dropped: headers cut short or inconsistent.
    Malformed = 8, "malformed";
    /// Dropped: TTL expired; the sender was told.
    TtlExpired = 9, "ttl-expired";
    /// Dropped: no eligible backend in the pool.
    NoBackend = 10, "no-backend";
    /// Dropped: no free SNAT port within the bound on probes.
    SnatExhausted = 11, "snat-exhausted";
    /// Dropped: the established table is full.
    EstablishedFull = 12, "established-full";
    /// Dropped: no route towards the rewritten destination.
    NoRoute = 13, "no-route";
    /// Dropped: longer than the egress MTU and must not be fragmented; the sender was told.
    TooBig = 14, "too-big";
    /// Dropped: from a dnat backend, without a flow; passing it would leak the pod's address.
    ReplyWithoutFlow = 15, "reply-without-flow";
    /// Dropped: the flow's other half belongs to another flow.
    TwinTaken = 16, "twin-taken";
    /// Dropped: the half-open table refused an entry.
    HalfOpenFull = 17, "half-open-full";
    /// Dropped: a map that must have an element did not; the daemon has not set the program up.
    NotReady = 18, "not-ready";
    /// Dropped: a flow selected a backend that has no SNAT address yet.
    NoSnatAddress = 19, "no-snat-address";
    /// Dropped: the source ranges of the service do not let this source in.
    SourceDenied = 26, "source-denied";
    /// Dropped: the source starts flows faster than the service allows.
    SourceFlowRate = 27, "source-flow-rate";
    /// Dropped: the source sends packets faster than the service allows.
    SourcePacketRate = 28, "source-packet-rate";
    /// Dropped: the source has as many half-open flows as the service allows.
    SourceHalfOpen = 29, "source-half-open";
    /// Dropped: every eligible backend has as many connections as it may have.
    BackendsFull = 36, "backends-full";
    /// Dropped as expired or too big, and the sender not told: too many messages were sent this moment.
    IcmpLimited = 20, "icmp-limited";
    /// Dropped as expired or too big, and the sender not told: nobody may be told about this packet (RFC 1812,
    /// 4.3.2.7; RFC 4443, 2.4), or no address to tell it from is known.
    IcmpUnanswered = 21, "icmp-unanswered";
    /// Dropped: an ICMP error that expired or is too big itself; nobody is told about errors.
    IcmpUndeliverable = 22, "icmp-undeliverable";
    /// Dropped: a later fragment of a packet whose flow has gone meanwhile.
    FragmentWithoutFlow = 23, "fragment-without-flow";
    /// Dropped: in the middle of a TCP connection that this edge does not know; the client was told by a RST.
    MidFlowReset = 32, "mid-flow-reset";
    /// Dropped: as `mid-flow-reset`, and nobody told: a RST itself, a packet with IP options, or too soon after the program was
    /// attached or another edge was lost.
    MidFlowSilent = 33, "mid-flow-silent";
    /// Dropped: as `mid-flow-reset`, and nobody told: too many were told this moment.
    MidFlowLimited = 34, "mid-flow-limited";
    /// Sent on: in the middle of a dnat service's connection that this edge does not know, by the backend that all edges choose.
    MidFlowAdopted = 52, "mid-flow-adopted";
    /// Sent on: a client's repeated SYN that nobody had answered, to another backend.
    RetriedElsewhere = 53, "retried-elsewhere";
    /// Sent on: an ICMP error about a flow's packet, translated.
    IcmpTranslated = 48, "icmp-translated";
    /// Passed: an ICMP error about one of our addresses whose quote matches no flow.
    IcmpUnmatched = 49, "icmp-unmatched";
}

impl Reason {
    /// True where the packet is dropped rather than passed: numbers 8 to 47.
    pub const fn is_drop(self) -> bool {
        self as u32 >= 8 && (self as u32) < 48
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drop_carries_its_reason_and_service_and_stays_a_drop() {
        let drop = Verdict::dropped(Reason::NoBackend, 1023, true);
        assert_eq!((drop.action(), drop.reported()), (Action::Drop, Some((Reason::NoBackend as u8, 1023))));
        assert_eq!(Verdict::dropped(Reason::NoBackend, 1, false).reported(), None);
        assert!(!drop.is_sent() && drop != Verdict::UNDECIDED);
    }

    #[test]
    fn an_interface_number_is_never_taken_for_a_reported_drop() {
        let redirect = Verdict::redirect(u32::MAX);
        assert_eq!((redirect.reported(), redirect.action()), (None, Action::Redirect(u32::MAX)));
        assert!(redirect.is_sent() && Verdict::TRANSMIT.is_sent() && !Verdict::PASS.is_sent());
    }

    #[test]
    fn an_answer_is_told_from_every_other_verdict_and_is_a_drop_until_it_is_made() {
        for (question, mtu) in [(Question::TimeExceeded, 0), (Question::TooBig, 1400)] {
            let answer = Verdict::answer(question, 1023, mtu);
            assert_eq!(answer.question(), Some((question, 1023, mtu)));
            assert_eq!((answer.action(), answer.reported(), answer.is_sent()), (Action::Drop, None, false));
        }
        let report = Verdict::dropped(Reason::NoBackend, 1023, true);
        let redirect = Verdict::redirect(u32::MAX);
        for other in [
            Verdict::PASS,
            Verdict::TRANSMIT,
            Verdict::UNDECIDED,
            Verdict::FORWARD,
            Verdict::MID_FLOW,
            report,
            redirect,
        ] {
            assert_eq!(other.question(), None);
        }
    }
}
