"""The messages of the wire, and the code that protoc generates from them."""
