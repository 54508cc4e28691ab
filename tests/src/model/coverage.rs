//! The model's decision points, and how often a run came by each.

macro_rules! points {
    ($($(#[$doc:meta])* $point:ident,)*) => {
        /// A branch of the pipeline, as the model sees it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Point { $($(#[$doc])* $point,)* }

        impl Point {
            /// Every point.
            pub const ALL: &'static [Point] = &[$(Point::$point,)*];
        }
    };
}

points! {
    /// No IP header: passes.
    NotIp,
    /// Neither address is in the prefilter: passes.
    NotOurs,
    /// Neither TCP nor UDP: passes.
    OtherProtocol,
    /// A TCP or UDP header behind IPv6 extension headers.
    Extensions,
    /// IPv6 extension headers of which only the stack can judge.
    ExtensionsForStack,
    /// IPv6 extension headers that the packet ends before.
    ExtensionsCutShort,
    /// A UDP datagram over IPv6 to a frontend without a checksum.
    NoChecksum,
    /// The same of a flow.
    FlowNoChecksum,
    /// The same of a dnat backend, without a flow.
    ReplyNoChecksum,
    /// An IPv6 packet to a frontend from a v4-mapped address.
    MappedSource,
    /// An ICMPv6 error from a link-local address.
    IcmpLinkLocal,
    /// The sender of a later fragment of IPv6 is to be told.
    LaterFragmentTold,
    /// A later fragment of a packet whose first one is not known.
    Fragment,
    /// A later fragment long after the first.
    FragmentTooLate,
    /// A first fragment was sent on, for the rest to follow.
    FirstFragment,
    /// A later fragment of a flow.
    LaterFragment,
    /// A later fragment of a flow that has gone.
    FragmentWithoutFlow,
    /// A later fragment whose lengths contradict each other or the frame.
    FragmentMalformed,
    /// A later fragment whose TTL ends here.
    FragmentTtl,
    /// A later fragment that is too long and must not be fragmented.
    FragmentTooBig,
    /// An ICMP error about a flow's packet was translated.
    IcmpTranslated,
    /// An ICMP error about what may be ours, but is nobody's flow.
    IcmpUnmatched,
    /// An ICMP error whose TTL ends here.
    IcmpExpired,
    /// An ICMP error that is too long and must not be fragmented.
    IcmpTooBig,
    /// dnat: an ICMP error that follows Maglev's choice.
    IcmpAssumed,
    /// dnat: an ICMP error about another choice than Maglev's.
    IcmpOtherChoice,
    /// The sender was told.
    Answered,
    /// The sender would have been told, had not so many been.
    AnswerLimited,
    /// Nobody may be told, or by no address.
    Unanswered,
    /// Lengths that contradict each other.
    Malformed,
    /// A range let the source in.
    RangeAllows,
    /// A range kept the source out.
    RangeDenies,
    /// No range has the source, which is let in.
    NoRangeAllows,
    /// No range has the source, which is kept out.
    NoRangeDenies,
    /// The source has as many half-open flows as it may have.
    QuotaReached,
    /// The source begins flows too fast.
    FlowsTooFast,
    /// The source sends packets too fast, of which this one would begin a flow.
    PacketsTooFast,
    /// The source may begin this flow.
    WithinLimits,
    /// A flow's packet is within the rate of its source.
    FlowKeepsPace,
    /// A flow's packet comes too fast for its source.
    FlowTooFast,
    /// A flow's service has a rate of packets no more.
    LimitIsGone,
    /// A flow is half-open no longer, and its source may have another.
    QuotaGivenBack,
    /// A flow is half-open no longer, which its window has taken for granted.
    EndedTooLate,
    /// Established, in the middle of its life.
    EstablishedHit,
    /// A touch refreshed the twin.
    TouchedTwin,
    /// A touch rebuilt the twin.
    RebuiltTwin,
    /// A touch could not rebuild the twin, since the table is full.
    TwinNotRebuilt,
    /// A touch found a stranger where the twin should be.
    TouchTwinTaken,
    /// A client's datagram after the idle timeout.
    TouchTooLate,
    /// An entry of a service that does not exist.
    TrackNoService,
    /// A closing entry had rested.
    ClosingExpired,
    /// A late packet of the old backend.
    Superseded,
    /// Nothing changes.
    Stay,
    /// A flag is set on both halves.
    Flag,
    /// A flag is set, the twin is gone or a stranger's.
    FlagWithoutTwin,
    /// A SYN-ACK tells what is to be acknowledged.
    Expect,
    /// A SYN-ACK of a flow whose client half is gone.
    ExpectWithoutTwin,
    /// An acknowledgement outside of the window does not promote.
    AckOutOfWindow,
    /// TCP promotion.
    PromoteTcp,
    /// UDP promotion.
    PromoteUdp,
    /// Promotion with a rebuilt twin.
    PromoteRebuiltTwin,
    /// Promotion into a full table.
    PromoteFull,
    /// Promotion of which one half fits.
    PromoteHalfFits,
    /// Promotion where a stranger has the twin's key.
    PromoteTwinTaken,
    /// Closed by RST.
    CloseReset,
    /// Closed by the second FIN.
    CloseFin,
    /// Closed with a missing twin.
    CloseRebuiltTwin,
    /// Closed where a stranger has the twin's key.
    CloseTwinTaken,
    /// A SYN or datagram on a closing or expired flow.
    Reopen,
    /// As `Reopen`, where a stranger has the twin's key.
    ReopenTwinTaken,
    /// A client's SYN again, with no answer.
    RepeatedSyn,
    /// A client's SYN again, once too often.
    Elsewhere,
    /// It got another backend.
    RetriedElsewhere,
    /// What a client acknowledges is remembered, since no SYN-ACK came by here.
    NotedAck,
    /// Promoted by a client's second acknowledgement.
    PromoteOneSided,
    /// Promoted by a backend's acknowledgement of a flow that began in mid-flow.
    PromoteAdopted,
    /// A reset was taken back.
    Restore,
    /// A reset was taken back, and another flow has the other half's key.
    RestoreTwinTaken,
    /// A segment in mid-flow of a dedicated VIP: the kernel answers.
    NoFlow,
    /// A segment in mid-flow, of which nobody is told.
    MidFlowSilent,
    /// A segment in mid-flow, answered by a reset.
    MidFlowReset,
    /// A segment in mid-flow that would have been answered, had not so many been.
    MidFlowLimited,
    /// A segment in mid-flow, adopted.
    AdoptedSegment,
    /// A reply in mid-flow, adopted.
    AdoptedReply,
    /// A segment or reply in mid-flow whose tuple has another flow.
    AdoptTaken,
    /// A reply in mid-flow whose client has another backend.
    ReplyOfAnother,
    /// A segment in mid-flow, with no backend to adopt it.
    AdoptNoBackend,
    /// What a backend of all ports says is from a port that is another service's.
    PortOfAnother,
    /// A packet to a service of all ports.
    AllPorts,
    /// A dnat backend's packet without a flow.
    ReplyWithoutFlow,
    /// A dnat backend's packet to this host.
    BackendToHost,
    /// Our address, no frontend.
    NoFrontend,
    /// The source filter lies: no such backend.
    NotABackend,
    /// A new flow with an expiring TTL.
    CreateTtl,
    /// A frontend of a service that does not exist.
    CreateNoService,
    /// No eligible backend.
    NoBackend,
    /// Selected in the tuple's own slot.
    SelectedOwn,
    /// Selected in one of the next slots.
    SelectedNext,
    /// Selected by a scan of the pool.
    SelectedScan,
    /// The client is at home with a backend.
    AtHome,
    /// Its home did not answer it.
    HomeSilent,
    /// It has no home.
    NoHome,
    /// It has been away for too long.
    AwayTooLong,
    /// Its home may have no new flows.
    HomeOut,
    /// Its home's number is another service's.
    HomeOfAnother,
    /// Its home is full.
    HomeFull,
    /// A flow that proved itself is its client's home from now on.
    NewHome,
    /// It was already.
    SameHome,
    /// Another backend was, and stays it.
    AnotherWasFirst,
    /// Another backend was, and is no more.
    Moved,
    /// Selected by turns.
    Turn,
    /// The first of two is not the more loaded one.
    FirstOfTwo,
    /// The second of two is less loaded.
    SecondOfTwo,
    /// There is no second one.
    OneOfOne,
    /// Selected from the backup tier, nobody in the primary one being eligible.
    Backup,
    /// The same, those that are being full.
    BackupForFull,
    /// A full backend was passed over for another of its tier.
    FullPassedOver,
    /// A backend is full with the flows that pend.
    FullByPending,
    /// It would be, did more than a quarter of the limit count.
    PendingCapped,
    /// Of the flows that pend half were forgotten.
    PendingHalved,
    /// Backends are eligible, and all that were met are full.
    BackendsFull,
    /// No SNAT address.
    NoSnatAddress,
    /// dnat: the client's own source.
    CreateDnat,
    /// dnat: somebody else has that tuple.
    CreateDnatTaken,
    /// full-nat: the source of the client's past flow.
    CreateOwnPort,
    /// full-nat: that source is somebody else's.
    CreateOwnPortTaken,
    /// full-nat: a source of the backend's candidates.
    CreateFullNat,
    /// full-nat: a source that a closed flow has rested on.
    CreateRestedPort,
    /// A half-open flow whose client gave up lost its port to another.
    CreateStalledPort,
    /// An entry that timed out gave way to the client's own port.
    Yielded,
    /// The tuple has a half-open flow beside the one that ended.
    Joined,
    /// All candidates are in use.
    SnatExhausted,
    /// An existing flow's packet with an expiring TTL.
    ForwardTtl,
    /// The MSS of a SYN was lowered.
    MssLowered,
    /// The route is looked up.
    Resolve,
    /// A next-hop number was given out.
    NewNextHop,
    /// A known next hop changed.
    ChangedNextHop,
    /// No numbers are left.
    NoNextHopNumber,
    /// A gateway that is no IPv4 neighbour.
    ForeignGateway,
    /// Neighbour unresolved.
    NoNeighbour,
    /// No route.
    NoRoute,
    /// XDP cannot redirect there: to the stack.
    ViaStack,
    /// Too long, may be fragmented: to the stack.
    TooLongToStack,
    /// Too long, must not be fragmented.
    TooBig,
    /// A next-hop number that is none.
    NoNextHop,
    /// Out of the interface it came in by.
    Transmit,
    /// Out of another interface.
    Redirect,
    /// A GSO packet judged by its segments.
    Gso,
    /// A packet that came with a VLAN tag goes to the stack or back to its sender with it.
    TagReturned,
    /// A packet that came with a VLAN tag leaves without it.
    TagGone,
}

/// Visits of a point below which a run says so.
const FEW: u64 = 20;

/// How often each point was met.
#[derive(Clone, Debug)]
pub struct Coverage(Vec<u64>);

impl Default for Coverage {
    fn default() -> Self {
        Self(vec![0; Point::ALL.len()])
    }
}

impl Coverage {
    /// Counts a visit.
    pub fn hit(&mut self, point: Point) {
        self.0[point as usize] += 1;
    }

    /// Counts a visit where there was one.
    pub fn hit_if(&mut self, point: Point, met: bool) {
        self.0[point as usize] += u64::from(met);
    }

    /// Adds another run's visits.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.0.iter_mut().zip(&other.0) {
            *sum += count;
        }
    }

    /// How often a point was met.
    pub fn count(&self, point: Point) -> u64 {
        self.0[point as usize]
    }

    /// The points that few packets came by, and how many.
    pub fn seldom(&self) -> Vec<(Point, u64)> {
        let counts = Point::ALL.iter().map(|point| (*point, self.count(*point)));
        counts.filter(|(_, count)| (1..FEW).contains(count)).collect()
    }

    /// The points that no packet came by.
    pub fn missed(&self) -> Vec<Point> {
        Point::ALL.iter().copied().filter(|point| self.count(*point) == 0).collect()
    }
}
