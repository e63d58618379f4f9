# The kind and sha256 of the path $1: of a file its content; of a folder the names and sizes of the files in it and the names of the folders
# (the size of a folder is the file system's, and depends on what it held once).
# shellcheck shell=sh disable=SC2012
if [ -d "$1" ]; then
  echo folder
  ls -lnR -- "$1/" | awk '/^[-l]/ {size = $5; for (i = 1; i < 9; i++) sub(/^[^ ]+ +/, ""); print size, $0} /^\//' | sha256sum
else
  echo file
  sha256sum <"$1"
fi
