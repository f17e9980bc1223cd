"""The toy world: the characters, scenes and captions that the embedded base is trained on.

Data flows one way: `characters` and `scenes` say what exists, `sprites` fetches the drawings, `render` puts them
into pictures, `captions` says what a picture shows; `recipe` trains the embedded base, the scoring CLIP and the
judge from them, and `judge` tells which characters a picture shows.
"""
