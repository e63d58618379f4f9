#compdef omnilaunch
# Completion of omnilaunch for zsh, after compinit. To enable it: source <(omnilaunch completion zsh)
_omnilaunch() {
    local -a found
    found=("${(@f)$("${~words[1]}" --complete "${(@)words[2,CURRENT-1]}" "$PREFIX" 2> /dev/null)}")
    found=(${found:#})
    (( ${#found} )) || { _files; return }
    compadd -S '' -- ${(M)found:#*[=.]}
    compadd -- ${found:#*[=.]}
}
compdef _omnilaunch omnilaunch
