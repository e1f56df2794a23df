// <metal_logging>: messages are accepted and dropped.
#pragma once

namespace metal {

struct os_log {
  constexpr os_log(const constant char*, const constant char*) constant {}
#define EMU_LOG(name)                                   \
  template <class... A>                                 \
  void name(const constant char*, A...) const {}        \
  template <class... A>                                 \
  void name(const constant char*, A...) const constant {}
  EMU_LOG(log)
  EMU_LOG(log_debug)
  EMU_LOG(log_info)
  EMU_LOG(log_error)
  EMU_LOG(log_fault)
#undef EMU_LOG
};

}  // namespace metal
