//! `capture`: packets of a service as they came in and as they left, into a pcapng file with an interface for each.

use std::{
    borrow::Cow,
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use clap::Args;
use pcap_file::{
    DataLink,
    pcapng::{
        PcapNgWriter,
        blocks::{
            enhanced_packet::EnhancedPacketBlock,
            interface_description::{InterfaceDescriptionBlock, InterfaceDescriptionOption},
        },
    },
};

use crate::model::capture::{CaptureOrder, Frame};

/// How long the daemon lets the program copy unless the order is repeated, seconds.
const LEASE: u8 = 4;
/// Between two orders.
const RENEW: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct CaptureArgs {
    /// Listen address and port, or a service's name
    pub vip: String,
    /// File to write, pcapng; `-` is standard output. With or without -w before it, as with tcpdump
    // -w is the flag `--watch` of every command, so that `-w FILE` reads as that flag and this argument.
    #[arg(value_name = "FILE")]
    pub write: PathBuf,
    /// Stop after so many packets
    #[arg(long, short = 'n', value_name = "N")]
    pub count: Option<u64>,
    /// Bytes of each packet
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(64..=9216))]
    pub snaplen: u16,
    /// Only this backend's packets (address and port)
    #[arg(long)]
    pub backend: Option<String>,
    /// Stop after so many seconds
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
}

impl CaptureArgs {
    fn order(&self, seconds: u8) -> CaptureOrder {
        CaptureOrder { vip: self.vip.clone(), backend: self.backend.clone(), length: self.snaplen, seconds }
    }
}

/// Captures until told to stop; the packets written and those that found no room.
pub(super) fn run(
    args: &CaptureArgs,
    mut tap: Box<dyn crate::model::capture::Tap>,
    mut ask: impl FnMut(CaptureOrder) -> Result<(), String>,
) -> Result<(u64, u64), String> {
    let mut file = Pcap::create(args)?;
    let (start, mut lost) = (Instant::now(), 0);
    let mut renewed: Option<Instant> = None;
    let limit = args.count.unwrap_or(u64::MAX);
    let failed = |error: pcap_file::PcapError| format!("writing {}: {error}", args.write.display());
    while file.written < limit && args.seconds.is_none_or(|seconds| start.elapsed().as_secs() < seconds) {
        if renewed.is_none_or(|at| at.elapsed() >= RENEW) {
            ask(args.order(LEASE))?;
            renewed = Some(Instant::now());
        }
        let mut result = Ok(());
        lost += tap.take(Duration::from_millis(200), &mut |frame| {
            if result.is_ok() && file.written < limit {
                result = file.add(frame);
            }
        })?;
        result.map_err(failed)?;
        // Whoever stops this by a signal finds what was captured until now.
        file.flush().map_err(|error| format!("writing {}: {error}", args.write.display()))?;
    }
    // An order that cannot be taken back ends by itself.
    let _ = ask(args.order(0));
    Ok((file.written, lost))
}

struct Pcap {
    writer: PcapNgWriter<BufWriter<Box<dyn Write>>>,
    written: u64,
}

impl Pcap {
    fn create(args: &CaptureArgs) -> Result<Self, String> {
        let failed = |error: &dyn std::fmt::Display| format!("writing {}: {error}", args.write.display());
        let file: Box<dyn Write> = match args.write.to_str() {
            Some("-") => Box::new(std::io::stdout()),
            _ => Box::new(File::create(&args.write).map_err(|error| failed(&error))?),
        };
        let mut writer = PcapNgWriter::new(BufWriter::new(file)).map_err(|error| failed(&error))?;
        for (name, what) in [("before", "packets as they came in"), ("after", "the same packets, rewritten")] {
            let block = InterfaceDescriptionBlock {
                linktype: DataLink::ETHERNET,
                snaplen: u32::from(args.snaplen),
                options: vec![
                    InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                    InterfaceDescriptionOption::IfDescription(Cow::Borrowed(what)),
                    // Nanoseconds.
                    InterfaceDescriptionOption::IfTsResol(9),
                ],
            };
            writer.write_pcapng_block(block).map_err(|error| failed(&error))?;
        }
        Ok(Self { writer, written: 0 })
    }

    fn add(&mut self, frame: Frame) -> Result<(), pcap_file::PcapError> {
        let block = EnhancedPacketBlock {
            interface_id: u32::from(frame.after),
            timestamp: frame.time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
            original_len: frame.length,
            data: Cow::Owned(frame.bytes),
            options: Vec::new(),
        };
        self.writer.write_pcapng_block(block)?;
        self.written += 1;
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.writer.get_mut().flush()
    }
}
