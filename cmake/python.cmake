# What the wheel takes from the build: the library under one plain name (a wheel holds no links), and
# the cffi module made from the header.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter)

set(header ${PROJECT_SOURCE_DIR}/include/mooncake_ep.h)
set(generator ${PROJECT_SOURCE_DIR}/tools/gen_ffi.py)
set(ffi_dir ${PROJECT_BINARY_DIR}/python)
set(ffi_files ${ffi_dir}/_ffi.py ${ffi_dir}/_ffi.pyi)
add_custom_command(
  OUTPUT ${ffi_files}
  COMMAND ${CMAKE_COMMAND} -E make_directory ${ffi_dir}
  COMMAND Python::Interpreter ${generator} ${header} ${ffi_dir}
  DEPENDS ${generator} ${header}
  COMMENT "Generating the cffi module from mooncake_ep.h"
  VERBATIM)
add_custom_target(mooncake_ep_ffi ALL DEPENDS ${ffi_files})

set_target_properties(mooncake_ep PROPERTIES NO_SONAME ON VERSION "" SOVERSION "")
install(TARGETS mooncake_ep LIBRARY DESTINATION mooncake_ep COMPONENT python)
install(FILES ${ffi_files} DESTINATION mooncake_ep COMPONENT python)
