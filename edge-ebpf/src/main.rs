#![no_std]
#![no_main]
use aya_ebpf::{bindings::xdp_action, macros::xdp, programs::XdpContext, macros::map, maps::HashMap};
use edge_common::{flow::FlowKeyV4, maps::FlowV4};
#[map]
static ESTABLISHED: HashMap<FlowKeyV4, FlowV4> = HashMap::pinned(1024, 0);
#[xdp]
pub fn edge_xdp(_ctx: XdpContext) -> u32 {
    let k = FlowKeyV4::new(1,2,3,4,5);
    if ESTABLISHED.get_ptr(&k).is_some() { return xdp_action::XDP_DROP; }
    xdp_action::XDP_PASS
}
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! { loop {} }
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
