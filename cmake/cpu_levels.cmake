# libep/backend/cpu_kernels.cc, once for each level of the CPU's instruction set.

# One level: its name, and the compiler's flags for it.
function(mep_add_cpu_level name)
  add_library(mooncake_ep_cpu_${name} OBJECT ${PROJECT_SOURCE_DIR}/libep/backend/cpu_kernels.cc)
  target_compile_definitions(mooncake_ep_cpu_${name} PRIVATE EP_CPU_LEVEL=cpu_${name}
                                                             EP_CPU_KERNELS=cpu_kernels_${name})
  # No product may be fused with a sum: all levels, and the GPUs, give the same bits.
  target_compile_options(mooncake_ep_cpu_${name} PRIVATE -ffp-contract=off ${ARGN})
  target_include_directories(mooncake_ep_cpu_${name} PRIVATE ${PROJECT_SOURCE_DIR}/include
                                                             ${PROJECT_SOURCE_DIR}/libep)
  set_target_properties(mooncake_ep_cpu_${name} PROPERTIES
    CXX_STANDARD 17
    CXX_STANDARD_REQUIRED ON
    CXX_EXTENSIONS OFF
    CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
  )
  if(MEP_SANITIZE)
    target_compile_options(mooncake_ep_cpu_${name} PRIVATE -fsanitize=${MEP_SANITIZE}
                                                           -fno-sanitize-recover=all)
  endif()
  target_sources(mooncake_ep_objects INTERFACE $<TARGET_OBJECTS:mooncake_ep_cpu_${name}>)
endfunction()

mep_add_cpu_level(base)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
  mep_add_cpu_level(avx2 -mavx2)
  mep_add_cpu_level(avx512 -mavx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq)
  target_compile_definitions(mooncake_ep_objects PRIVATE EP_CPU_LEVELS_X86)
endif()
