// Barriers. Each knows its place in the source, so that threads which wait at different ones are found.
#pragma once

#define EMU_HERE emu_site site = EMU_SITE(__builtin_LINE(), __builtin_COLUMN())

namespace metal {

enum class mem_flags : uint {
  mem_none = 0,
  mem_device = EMU_MEM_DEVICE,
  mem_threadgroup = EMU_MEM_THREADGROUP,
  mem_texture = 4,
  mem_threadgroup_imageblock = 8,
  mem_object_data = 16
};
EMU_FUNC constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((uint)a | (uint)b); }
EMU_FUNC constexpr mem_flags operator&(mem_flags a, mem_flags b) { return (mem_flags)((uint)a & (uint)b); }

EMU_FUNC void threadgroup_barrier(mem_flags flags, EMU_HERE) {
  emu_barrier(EMU_THREADGROUP_BARRIER, site, (uint)flags);
}
EMU_FUNC void simdgroup_barrier(mem_flags flags, EMU_HERE) { emu_barrier(EMU_SIMDGROUP_BARRIER, site, (uint)flags); }

}  // namespace metal
