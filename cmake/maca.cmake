# The MACA backend: one file, libep/backend/maca.cc, by MetaX's mxcc. Host code stays with the C++
# compiler. For tests there is a shim instead (tests/maca/shim), by which nvcc compiles that file.

set(MEP_MACA_ROOT "" CACHE PATH "The MACA SDK; empty: MACA_PATH, MACA_HOME or /opt/maca")
set(MEP_MACA_ARCHITECTURES xcore1000 CACHE STRING "Targets of mxcc: xcore1000 is C500 and its family")
option(MEP_MACA_FP8 "MACA: cast rows to FP8 in dispatch, by integer arithmetic" OFF)
option(MEP_MACA_SHIM "For tests, never installed: the MACA backend by nvcc, over the CUDA runtime" OFF)
mark_as_advanced(MEP_MACA_SHIM)

set(maca_source ${PROJECT_SOURCE_DIR}/libep/backend/maca.cc)
set(maca_definitions)
if(MEP_MACA_FP8)
  set(maca_definitions EP_MACA_FP8)
endif()

# ---- The shim -----------------------------------------------------------------------------------

if(MEP_MACA_SHIM)
  if(NOT TARGET mooncake_ep_cuda OR MEP_BUILD_PYTHON)
    message(FATAL_ERROR "MEP_MACA_SHIM=ON needs MEP_CUDA, and is for tests, not for a wheel")
  endif()
  message(STATUS "MACA: a shim over CUDA, for tests; it is not MACA, and not installed")
  set(MEP_INSTALL OFF)
  add_library(mooncake_ep_maca OBJECT ${maca_source})
  set_source_files_properties(${maca_source} PROPERTIES LANGUAGE CUDA)
  target_include_directories(mooncake_ep_maca PRIVATE
    ${PROJECT_SOURCE_DIR}/tests/maca/shim/over_cuda ${PROJECT_SOURCE_DIR}/include
    ${PROJECT_SOURCE_DIR}/libep)
  target_compile_definitions(mooncake_ep_maca PRIVATE ${maca_definitions})
  target_compile_options(mooncake_ep_maca PRIVATE --fmad=false)
  set_target_properties(mooncake_ep_maca PROPERTIES
    CUDA_STANDARD 17
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_RUNTIME_LIBRARY Static
    CUDA_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON
  )
  target_sources(mooncake_ep_objects INTERFACE $<TARGET_OBJECTS:mooncake_ep_maca>)
  return()
endif()

# ---- mxcc ---------------------------------------------------------------------------------------

set(use_maca ${MEP_MACA})
if(MEP_MACA STREQUAL "AUTO" AND "$ENV{MOONCAKE_EP_USE_MACA}" STREQUAL "1")
  set(use_maca ON)
endif()

set(maca_roots ${MEP_MACA_ROOT})
if(NOT maca_roots)
  set(maca_roots $ENV{MACA_PATH} $ENV{MACA_HOME} /opt/maca)
endif()
if(use_maca)
  find_program(MEP_MXCC mxcc PATHS ${maca_roots} PATH_SUFFIXES mxgpu_llvm/bin bin
               DOC "MetaX's compiler" NO_DEFAULT_PATH)
  mark_as_advanced(MEP_MXCC)
endif()

if(NOT use_maca OR (NOT MEP_MXCC AND use_maca STREQUAL "AUTO"))
  set(reason "MEP_MACA=OFF")
  if(use_maca)
    set(reason "no mxcc")
  endif()
  message(STATUS "MACA: off (${reason})")
  target_sources(mooncake_ep_objects PRIVATE libep/backend/no_maca.cc)
  return()
endif()
if(NOT MEP_MXCC)
  list(JOIN maca_roots ", " searched)
  message(FATAL_ERROR "The MACA backend is asked for (MEP_MACA=ON or MOONCAKE_EP_USE_MACA=1), but there "
                      "is no mxcc in mxgpu_llvm/bin or bin of: ${searched}. Set MEP_MACA_ROOT to the SDK.")
endif()

cmake_path(GET MEP_MXCC PARENT_PATH maca_root)
while(NOT IS_DIRECTORY ${maca_root}/include AND NOT maca_root STREQUAL "/")
  cmake_path(GET maca_root PARENT_PATH maca_root)
endwhile()
foreach(library mcruntime mxc-runtime64)
  find_library(MEP_MACA_${library} ${library} PATHS ${maca_root} PATH_SUFFIXES lib64 lib
               NO_DEFAULT_PATH REQUIRED)
  mark_as_advanced(MEP_MACA_${library})
endforeach()
list(JOIN MEP_MACA_ARCHITECTURES ", " architectures)
message(STATUS "MACA: on, by ${MEP_MXCC}, for ${architectures}")

set(maca_object ${PROJECT_BINARY_DIR}/maca.o)
list(TRANSFORM MEP_MACA_ARCHITECTURES PREPEND "--offload-arch=" OUTPUT_VARIABLE maca_targets)
list(TRANSFORM maca_definitions PREPEND "-D")
# No product may be fused with a sum: GPUs and CPUs give the same bits.
add_custom_command(
  OUTPUT ${maca_object}
  COMMAND ${MEP_MXCC} -x maca --maca-path=${maca_root} ${maca_targets} -std=c++17 -O3 -fPIC
          -fvisibility=hidden -ffp-contract=off ${maca_definitions}
          -I${PROJECT_SOURCE_DIR}/include -I${PROJECT_SOURCE_DIR}/libep -I${maca_root}/include
          -MMD -MT ${maca_object} -MF ${maca_object}.d -c ${maca_source} -o ${maca_object}
  DEPENDS ${maca_source}
  DEPFILE ${maca_object}.d
  COMMENT "Compiling libep/backend/maca.cc with mxcc"
  VERBATIM)
add_custom_target(mooncake_ep_maca DEPENDS ${maca_object})
add_dependencies(mooncake_ep_objects mooncake_ep_maca)
set_source_files_properties(${maca_object} PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)
target_sources(mooncake_ep_objects INTERFACE ${maca_object})
target_link_libraries(mooncake_ep_objects INTERFACE ${MEP_MACA_mcruntime} ${MEP_MACA_mxc-runtime64})
