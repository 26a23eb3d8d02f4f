#!/bin/sh
# The C kernels under AddressSanitizer and UndefinedBehaviorSanitizer: scripts/sanitize.sh [pytest arguments]
# kernels/native.py compiles with $CC, which here adds them; their runtime has to be loaded before Python's.
set -eu
cd "$(dirname "$0")/.."
compiler=${CC:-gcc}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/cc" <<EOF
#!/bin/sh
exec $compiler "\$@" -g -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all
EOF
chmod +x "$folder/cc"
if [ $# = 0 ]; then
    # the last one measures the process's memory, of which the sanitizers keep what was freed
    set -- tests/kernels --ignore tests/kernels/test_triton_kernels.py --ignore tests/kernels/test_native.py \
        --deselect tests/kernels/test_bf16_matmul.py::test_products_of_ever_new_shapes_take_no_more_than_is_counted
fi
runtime="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
python=$(command -v .venv/bin/python || command -v python)
export CC="$folder/cc" BYEORI_CACHE="$folder/cache" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
export LD_PRELOAD="$runtime"
# -s: a report is written by the process that ends; without kernels PyTorch's own operations would pass in their place
"$python" -c 'from byeori.kernels import native; assert native.problem() is None, native.problem()'
"$python" -m pytest -x -q -s -p no:cacheprovider -p no:xdist "$@"
