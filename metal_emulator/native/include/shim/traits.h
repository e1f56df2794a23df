// <metal_type_traits>, <metal_array>, <metal_uniform>, as far as kernels use them. MLX defines is_empty, void_t and
// is_static itself, so Metal has none.
#pragma once

namespace metal {

template <class T, T v>
struct integral_constant {
  static constexpr constant T value = v;
  using value_type = T;
  using type = integral_constant;
  constexpr operator T() const { return v; }
};
template <bool B>
using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>;
using false_type = bool_constant<false>;

template <bool B, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  using type = T;
};
template <bool B, class T = void>
using enable_if_t = typename enable_if<B, T>::type;

template <bool B, class T, class F>
struct conditional {
  using type = T;
};
template <class T, class F>
struct conditional<false, T, F> {
  using type = F;
};
template <bool B, class T, class F>
using conditional_t = typename conditional<B, T, F>::type;

// Metal's types do not show the address space that clang keeps in them.
template <class T>
struct remove_addrspace {
  using type = T;
};
template <class T>
struct remove_addrspace<device T> {
  using type = T;
};
template <class T>
struct remove_addrspace<constant T> {
  using type = T;
};
template <class T>
struct remove_addrspace<threadgroup T> {
  using type = T;
};
template <class T>
struct remove_addrspace<thread T> {
  using type = T;
};
template <class T>
using remove_addrspace_t = typename remove_addrspace<T>::type;

template <class T>
struct remove_const {
  using type = T;
};
template <class T>
struct remove_const<const T> {
  using type = T;
};
template <class T>
using remove_const_t = typename remove_const<T>::type;
template <class T>
struct remove_volatile {
  using type = T;
};
template <class T>
struct remove_volatile<volatile T> {
  using type = T;
};
template <class T>
using remove_volatile_t = typename remove_volatile<T>::type;
template <class T>
struct remove_cv {
  using type = remove_addrspace_t<remove_const_t<remove_volatile_t<T>>>;
};
template <class T>
using remove_cv_t = typename remove_cv<T>::type;

template <class T>
struct remove_reference {
  using type = T;
};
template <class T>
struct remove_reference<T&> {
  using type = T;
};
template <class T>
struct remove_reference<T&&> {
  using type = T;
};
template <class T>
using remove_reference_t = typename remove_reference<T>::type;
template <class T>
struct remove_pointer {
  using type = T;
};
template <class T>
struct remove_pointer<T*> {
  using type = T;
};
template <class T>
using remove_pointer_t = typename remove_pointer<T>::type;
template <class T>
struct decay {
  using type = remove_cv_t<remove_reference_t<T>>;
};
template <class T>
using decay_t = typename decay<T>::type;

template <class A, class B>
struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B>
struct is_convertible : bool_constant<__is_convertible(A, B)> {};
template <class T>
struct is_enum : bool_constant<__is_enum(T)> {};
template <class T>
struct is_class : bool_constant<__is_class(T)> {};
template <class T>
struct is_void : is_same<remove_cv_t<T>, void> {};
template <class T>
struct is_const : false_type {};
template <class T>
struct is_const<const T> : true_type {};
template <class T>
struct is_pointer : false_type {};
template <class T>
struct is_pointer<T*> : true_type {};
template <class T>
struct is_reference : bool_constant<!__is_same(T, remove_reference_t<T>)> {};

template <class T, class... Others>
constexpr constant bool emu_is_one_of = (__is_same(T, Others) || ...);

template <class T>
struct is_integral : bool_constant<emu_is_one_of<remove_cv_t<T>, bool, char, signed char, uchar, short, ushort, int,
                                                 uint, long, ulong>> {};
template <class T>
struct is_floating_point : bool_constant<emu_is_one_of<remove_cv_t<T>, half, bfloat, float>> {};
template <class T>
struct is_arithmetic : bool_constant<is_integral<T>::value || is_floating_point<T>::value> {};
template <class T>
struct is_scalar : bool_constant<is_arithmetic<T>::value || is_pointer<T>::value || __is_enum(T)> {};
template <class T, bool = is_arithmetic<T>::value>
struct is_signed : bool_constant<(T(-1) < T(0))> {};
template <class T>
struct is_signed<T, false> : false_type {};
template <class T>
struct is_unsigned : bool_constant<is_arithmetic<T>::value && !is_signed<T>::value> {};

template <class A, class B>
constexpr constant bool is_same_v = is_same<A, B>::value;
template <class A, class B>
constexpr constant bool is_convertible_v = is_convertible<A, B>::value;
template <class T>
constexpr constant bool is_integral_v = is_integral<T>::value;
template <class T>
constexpr constant bool is_floating_point_v = is_floating_point<T>::value;
template <class T>
constexpr constant bool is_arithmetic_v = is_arithmetic<T>::value;
template <class T>
constexpr constant bool is_scalar_v = is_scalar<T>::value;
template <class T>
constexpr constant bool is_signed_v = is_signed<T>::value;
template <class T>
constexpr constant bool is_unsigned_v = is_unsigned<T>::value;
template <class T>
constexpr constant bool is_void_v = is_void<T>::value;
template <class T>
constexpr constant bool is_enum_v = is_enum<T>::value;
template <class T>
constexpr constant bool is_class_v = is_class<T>::value;
template <class T>
constexpr constant bool is_pointer_v = is_pointer<T>::value;
template <class T>
constexpr constant bool is_const_v = is_const<T>::value;

template <class T>
struct make_unsigned {
  using type = __make_unsigned(T);
};
template <class T>
using make_unsigned_t = typename make_unsigned<T>::type;
template <class T>
struct make_signed {
  using type = __make_signed(T);
};
template <class T>
using make_signed_t = typename make_signed<T>::type;

template <class... B>
struct disjunction : false_type {};
template <class A, class... B>
struct disjunction<A, B...> : conditional_t<bool(A::value), A, disjunction<B...>> {};
template <class... B>
struct conjunction : true_type {};
template <class A, class... B>
struct conjunction<A, B...> : conditional_t<bool(A::value), conjunction<B...>, A> {};
template <class A>
struct negation : bool_constant<!bool(A::value)> {};
template <class... B>
using _disjunction = disjunction<B...>;  // MLX asks for Metal's own inner names
template <class... B>
using _conjunction = conjunction<B...>;

template <class T>
T&& declval();

// A value that is the same for all threads; here that is the writer's word.
template <class T>
using uniform = T;
template <class T>
EMU_FUNC T make_uniform(T x) {
  return x;
}

template <class T, size_t N>
struct array {
  T emu_elements[N];
  EMU_FUNC constexpr size_t size() const { return N; }
  EMU_FUNC constexpr size_t size() const constant { return N; }
  EMU_FUNC constexpr bool empty() const { return N == 0; }
  EMU_FUNC constexpr const T& operator[](size_t i) const { return emu_elements[i]; }
  EMU_FUNC constexpr T& operator[](size_t i) { return emu_elements[i]; }
  EMU_FUNC constexpr const constant T& operator[](size_t i) const constant { return emu_elements[i]; }
  EMU_FUNC constexpr const T* data() const { return emu_elements; }
  EMU_FUNC constexpr T* data() { return emu_elements; }
  EMU_FUNC constexpr const T* begin() const { return emu_elements; }
  EMU_FUNC constexpr T* begin() { return emu_elements; }
  EMU_FUNC constexpr const T* end() const { return emu_elements + N; }
  EMU_FUNC constexpr T* end() { return emu_elements + N; }
  EMU_FUNC constexpr const T& front() const { return emu_elements[0]; }
  EMU_FUNC constexpr const T& back() const { return emu_elements[N - 1]; }
  EMU_FUNC constexpr void fill(T value) {
    for (size_t i = 0; i < N; i++) emu_elements[i] = value;
  }
};

}  // namespace metal
