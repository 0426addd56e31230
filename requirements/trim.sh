#!/bin/sh
# trim.sh ENVIRONMENT: take away what is installed there and never runs in an image: what libraries are tested with, what
# editors, compilers and debuggers read, and, of libraries that only come whole, large parts that nothing here asks for.
set -eu
cd "$1"/lib/python3.*/site-packages
find . -depth -type d -name tests -exec rm -r {} +
find . -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.map' \) -delete
# Of all that AWS offers: S3, and where credentials for it come from.
if [ -d botocore/data ]; then
  find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -r {} +
fi
# Arrow's RPC, query plans and headers; maps for Jupyter.
rm -rf pyarrow/include pyarrow/src pyarrow/*flight* pyarrow/*substrait* pydeck/nbextension
