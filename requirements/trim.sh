#!/bin/sh
# trim.sh ENVIRONMENT MODULE…: take away what is installed there and never runs in an image (what libraries are tested
# with, what editors, compilers and debuggers read, and, of libraries that only come whole, large parts that nothing here
# asks for), then import each MODULE, to see that nothing is missed.
set -eu
environment=$1
shift
cd "$environment"/lib/python3.*/site-packages
find . -depth -type d -name tests -exec rm -r {} +
find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.map' \) -delete
# Of all that AWS offers: S3, and where credentials for it come from.
if [ -d botocore/data ]; then
  find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -r {} +
fi
# Arrow's RPC, headers, and the names that linkers use for libraries; DICOM's structured reports; maps for
# Jupyter; AVIF, which is no format of ours (docs/input.md).
rm -rf pyarrow/include pyarrow/src pyarrow/*flight* pyarrow/libarrow_python*.so pyarrow/*.so.*.*.*
rm -rf pydicom/sr pydicom/data/test_files pydeck/nbextension PIL/_avif*.so pillow.libs/libavif*
home=$(mktemp -d) # what libraries write there is not for the image
for module in "$@"; do
  HOME=$home "$environment"/bin/python -B -c "import $module"
done
rm -rf "$home"
