//! Enumerations of a peer that is newer or older than we are.
//!
//! QEMU adds values with every release. A reply must not become unreadable because of one, so every
//! enumeration keeps what it does not know as text.

/// Defines an enumeration of known texts, with a last variant `Other` for all the rest.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        $name:ident {
            $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)+
            /// A value that this crate does not know, as it came.
            Other(String),
        }

        impl $name {
            /// The value as QEMU writes it.
            pub fn as_str(&self) -> &str {
                match self {
                    $(Self::$variant => $text,)+
                    Self::Other(text) => text,
                }
            }
        }

        impl From<&str> for $name {
            fn from(text: &str) -> Self {
                match text {
                    $($text => Self::$variant,)+
                    other => Self::Other(other.to_owned()),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <String as serde::Deserialize>::deserialize(deserializer)?;
                Ok(Self::from(text.as_str()))
            }
        }
    };
}

#[cfg(test)]
#[expect(unreachable_pub, reason = "the macro makes public types")]
mod tests {
    open_enum! {
        /// Colours of a peer.
        Colour {
            /// Red.
            Red = "red",
            /// Dark red.
            DarkRed = "dark-red",
        }
    }

    #[test]
    fn keeps_what_it_does_not_know() {
        let all: Vec<Colour> = serde_json::from_str(r#"["red","dark-red","mauve"]"#).unwrap();
        assert_eq!(
            all,
            [Colour::Red, Colour::DarkRed, Colour::Other("mauve".into())]
        );
        let back = serde_json::to_string(&all).unwrap();
        assert_eq!(back, r#"["red","dark-red","mauve"]"#);
    }
}
