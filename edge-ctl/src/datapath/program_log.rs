//! The program's own messages: aya-log records from the pinned ring buffer, passed on as log lines. There are a handful in
//! the life of the maps (`edge_common::maps::notice`), so they are fetched at leisure.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::Log;

/// A reader of the ring buffer; there should be one at a time.
pub struct ProgramLog {
    logger: EbpfLogger<&'static dyn Log>,
}

impl ProgramLog {
    /// Takes the ring buffer out of an object whose maps are the pinned ones.
    ///
    /// # Errors
    /// Where the object has none, or it cannot be mapped.
    pub fn open(ebpf: &mut Ebpf) -> Result<Self, aya_log::Error> {
        Ok(Self { logger: EbpfLogger::init_with_logger(ebpf, log::logger())? })
    }

    /// Passes on what is there, and waits for nothing.
    pub fn drain(&mut self) {
        self.logger.flush();
    }
}
