#!/usr/bin/env bash
# Puts engines' packages where `pytest -m engines` looks for them: unpacked, without their dependencies.
#   tests/engines/install.sh [sglang|ktransformers|vllm|vllm-ascend|deepspeed|llama.cpp|python]...     (default: all)
# MOESIM_ENGINES is the folder (default /tmp/moesim-engines), PYTHON the interpreter (default .venv/bin/python, with the
# extras torch and hf). Downloads 395 MB, takes 1.4 GB. llama.cpp is compiled twice (a C++ compiler and cmake are needed), as a
# program and as a Python package: about five minutes of one core each; JOBS sets how many cores it may use (default 1).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${MOESIM_ENGINES:-/tmp/moesim-engines}
python=${PYTHON:-.venv/bin/python}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
downloads=$folder/downloads
mkdir -p "$downloads"

fetch() { # fetch REQUIREMENT PIP_OPTION...: downloads one package and nothing that it needs
  local requirement=$1
  shift
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$downloads" "$@" "$requirement"
}

unpack() { # unpack NAME PATTERN: a wheel into the folder NAME, whole or not at all
  rm -rf "${folder:?}/$1.partial" "${folder:?}/$1"
  "$python" -m zipfile -e "$downloads"/$2 "$folder/$1.partial"
  mv "$folder/$1.partial" "$folder/$1"
}

unpack_sdist() { # unpack_sdist NAME PATTERN: a source archive, likewise
  rm -rf "${folder:?}/$1.partial" "${folder:?}/$1"
  mkdir "$folder/$1.partial"
  tar -xzf "$downloads"/$2 -C "$folder/$1.partial" --strip-components=1
  mv "$folder/$1.partial" "$folder/$1"
}

install_sglang() {
  fetch sglang==0.5.23 --only-binary :all:
  unpack sglang 'sglang-0.5.23-*.whl'
}

install_gguf() { # reads and writes llama.cpp's files; kt-kernel imports it too
  fetch gguf==0.19.0 --only-binary :all:
  unpack gguf 'gguf-0.19.0-*.whl'
}

install_ktransformers() {
  install_gguf
  fetch kt-kernel==0.7.2 --only-binary :all:
  fetch sglang-kt==0.7.2 --only-binary :all:
  unpack kt-kernel 'kt_kernel-0.7.2-*.whl'
  unpack sglang-kt 'sglang_kt-0.7.2-*.whl'
}

install_vllm() { # the source archive; its setup.py asks for torch and these two even to say its version
  "$python" -m pip install --quiet --disable-pip-version-check --target "$folder/build-tools" --upgrade setuptools-scm setuptools-rust
  PYTHONPATH=$folder/build-tools VLLM_VERSION_OVERRIDE=0.33.0 VLLM_TARGET_DEVICE=empty \
    fetch vllm==0.33.0 --no-binary vllm --no-build-isolation
  unpack_sdist vllm vllm-0.33.0.tar.gz
}

install_ascend() {
  fetch vllm-ascend==0.23.0 --only-binary :all:
  unpack vllm-ascend 'vllm_ascend-0.23.0-*.whl'
}

install_deepspeed() { # its setup.py asks for torch, and compiles nothing when told so
  DS_BUILD_OPS=0 fetch deepspeed==0.19.8 --no-binary deepspeed --no-build-isolation
  unpack_sdist deepspeed deepspeed-0.19.8.tar.gz
}

install_llama() { # the engine, its command line and its RPC server, whose CPU backend stands for a GPU
  fetch llama-cpp-python==0.3.36 --no-binary llama-cpp-python
  install_gguf
  unpack_sdist llama-src llama_cpp_python-0.3.36.tar.gz
  cmake -S "$folder/llama-src/vendor/llama.cpp" -B "$folder/llama-build" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DBUILD_SHARED_LIBS=OFF -DGGML_RPC=ON -DGGML_NATIVE=OFF \
    -DGGML_LLAMAFILE=OFF -DGGML_OPENMP=OFF -DGGML_CPU_REPACK=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
    > "$folder/llama-cmake.log"
  cmake --build "$folder/llama-build" --parallel "${JOBS:-1}" --target llama-completion ggml-rpc-server \
    > "$folder/llama-build.log"
}

install_python() { # packages that tests import themselves: llama.cpp's callback, GGUF files, measured kernel tables
  CMAKE_ARGS="-DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF -DMTMD_BUILD=OFF -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" \
    CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1} "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
    --target "$folder/site" llama-cpp-python==0.3.36 diskcache gguf==0.19.0 aiconfigurator-core==0.12.0
}

for engine in "${@:-all}"; do
  case $engine in
    sglang) install_sglang ;;
    ktransformers) install_ktransformers ;;
    vllm) install_vllm ;;
    vllm-ascend) install_ascend ;;
    deepspeed) install_deepspeed ;;
    llama.cpp) install_llama ;;
    python) install_python ;;
    all) install_sglang; install_ktransformers; install_vllm; install_ascend; install_deepspeed; install_llama; install_python ;;
    *) echo "unknown engine '$engine'; known: sglang, ktransformers, vllm, vllm-ascend, deepspeed, llama.cpp, python" >&2; exit 2 ;;
  esac
done
echo "in $folder: $(ls "$folder" | tr '\n' ' ')"
